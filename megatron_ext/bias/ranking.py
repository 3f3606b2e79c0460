"""Which block to fine-tune, or which part of one: places of a model in the order of their Block Mitigating Importance (BMI).

The name is LFTF's (arXiv 2505.15475). The one formula that is known, from a third-party re-implementation, is
`similarity`'s; it knows nothing of gender, so the estimators beside it are ours (`megatron_ext.blocks.importance`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from megatron_ext.errors import UserError

__all__ = ["BlockRanking"]


@dataclass(frozen=True)
class BlockRanking:
    """Scores of all blocks by one estimator, or of all places of a finer grain.

    Attributes:
        scores: of places 0, 1, ...; higher is more important. Of whole blocks a place's number is the block's.
        order: the places that may be chosen, best first; of equal ones the earlier.
        excluded: places that may not.
        grain: "blocks", "parts" or "heads".
        names: of the places, where they are no whole blocks.
    """

    estimator: str
    scores: tuple[float, ...]
    order: tuple[int, ...]
    excluded: tuple[int, ...] = ()
    grain: str = "blocks"
    names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        estimator: str,
        scores: Sequence[float],
        exclude: Collection[int] = (),
        grain: str = "blocks",
        names: Sequence[str] = (),
    ) -> BlockRanking:
        """
        Args:
            exclude: some of the places, but not all.

        Raises:
            UserError: a score that is not finite.
        """
        for place, score in enumerate(scores):
            if not math.isfinite(score):
                raise UserError(
                    f"estimator {estimator} gives block {names[place] if names else place} the score {score}: the model has "
                    "diverged, or its numbers overflow; rank a checkpoint from before that"
                )
        order = sorted(set(range(len(scores))) - set(exclude), key=lambda b: (-scores[b], b))
        assert order and len(order) + len(exclude) == len(scores), (exclude, len(scores))
        return cls(estimator, tuple(map(float, scores)), tuple(order), tuple(sorted(exclude)), grain, tuple(names))

    @property
    def best(self) -> int:
        return self.order[0]

    def name(self, place: int) -> str:
        return self.names[place] if self.names else str(place)

    def as_dict(self) -> dict:
        return asdict(self) | {"best": self.best}

    def markdown(self) -> str:
        """A table, best place first."""
        lines = ["| rank | block | score |", "|---:|---:|---:|"]
        lines += [f"| {rank} | {self.name(b)} | {self.scores[b]:.4g} |" for rank, b in enumerate(self.order, 1)]
        lines += [f"| excluded | {self.name(b)} | {self.scores[b]:.4g} |" for b in self.excluded]
        return "\n".join(lines)
