"""Which block to fine-tune: the blocks of a model in the order of their Block Mitigating Importance (BMI).

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
    """Scores of all blocks by one estimator.

    Attributes:
        scores: of blocks 0, 1, ...; higher is more important.
        order: the blocks that may be chosen, best first; of equal ones the earlier.
        excluded: blocks that may not.
    """

    estimator: str
    scores: tuple[float, ...]
    order: tuple[int, ...]
    excluded: tuple[int, ...] = ()

    @classmethod
    def of(cls, estimator: str, scores: Sequence[float], exclude: Collection[int] = ()) -> BlockRanking:
        """
        Args:
            exclude: some of the blocks, which `megatron_ext.blocks.importance.check_excluded` has checked.

        Raises:
            UserError: a score that is not finite.
        """
        for block, score in enumerate(scores):
            if not math.isfinite(score):
                raise UserError(
                    f"estimator {estimator} gives block {block} the score {score}: the model has diverged, or its numbers "
                    "overflow; rank a checkpoint from before that"
                )
        order = sorted(set(range(len(scores))) - set(exclude), key=lambda b: (-scores[b], b))
        assert order and len(order) + len(exclude) == len(scores), (exclude, len(scores))
        return cls(estimator, tuple(map(float, scores)), tuple(order), tuple(sorted(exclude)))

    @property
    def best(self) -> int:
        return self.order[0]

    def as_dict(self) -> dict:
        return asdict(self) | {"best": self.best}

    def markdown(self) -> str:
        """A table, best block first."""
        lines = ["| rank | block | score |", "|---:|---:|---:|"]
        lines += [f"| {rank} | {block} | {self.scores[block]:.4g} |" for rank, block in enumerate(self.order, 1)]
        lines += [f"| excluded | {block} | {self.scores[block]:.4g} |" for block in self.excluded]
        return "\n".join(lines)
