"""Which block to fine-tune: the blocks of a model in the order of their Block Mitigating Importance (BMI).

The name is LFTF's (arXiv 2505.15475). The one formula that is known, from a third-party re-implementation, is
`similarity`'s; it knows nothing of gender, so the estimators beside it are ours (`megatron_ext.models.locate`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

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
        Raises:
            ValueError: every block is excluded, or an excluded one does not exist.
        """
        for block in exclude:
            if not 0 <= block < len(scores):
                raise ValueError(f"excluded block {block} does not exist: the model has {len(scores)} blocks")
        order = sorted((b for b in range(len(scores)) if b not in exclude), key=lambda b: (-scores[b], b))
        if not order:
            raise ValueError(f"all {len(scores)} blocks are excluded: leave one to choose")
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
