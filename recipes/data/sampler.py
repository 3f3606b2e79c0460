"""The order in which rows are drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping

from megatron_ext.errors import UserError

__all__ = ["EpochSampler", "InOrder", "check_share", "shuffled"]


class EpochSampler:
    """Shuffled indices, epoch after epoch without end, in global batches of which this rank takes its slice.

    All ranks draw the same order. A batch that an epoch cannot fill is completed from the next one, so that every
    index is drawn once per epoch and none is left out.

    Args:
        count: number of rows.
        batch: size of a global batch, over all ranks.
        rank, world: this rank's place among the data-parallel ranks.
    """

    def __init__(self, count: int, batch: int, seed: int, rank: int, world: int):
        if count < 1 or batch < 1:
            raise UserError(f"there is nothing to draw: {count} rows in batches of {batch}; both must be at least 1")
        check_share(batch, world)
        assert 0 <= rank < world, (rank, world)
        self.count, self.batch, self.seed, self.rank, self.world = count, batch, seed, rank, world
        self._epoch = self._drawn = 0  # position: rows drawn of this epoch
        self._order = self._shuffled()

    def next(self) -> list[int]:
        """This rank's indices of the next global batch."""
        indices: list[int] = []
        while len(indices) < self.batch:
            if self._drawn == self.count:
                self._epoch, self._drawn = self._epoch + 1, 0
                self._order = self._shuffled()
            part = self._order[self._drawn : self._drawn + self.batch - len(indices)]
            self._drawn += len(part)
            indices += part
        share = self.batch // self.world
        return indices[self.rank * share : (self.rank + 1) * share]

    def state_dict(self) -> dict[str, int]:
        """The position, the same on every rank and for every batch size and number of ranks."""
        return {"epoch": self._epoch, "drawn": self._drawn, "count": self.count, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for name, here in (("count", self.count), ("seed", self.seed)):
            if state[name] != here:
                raise UserError(
                    f"the saved order of the data was drawn with {name}={state[name]}, this run has {name}={here}: "
                    "continue with the same data file and model.seed"
                )
        self._epoch, self._drawn = state["epoch"], state["drawn"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        return shuffled(self.count, f"{self.seed}/{self._epoch}")


def check_share(batch: int, world: int) -> None:
    """Refuse a global batch that data-parallel ranks cannot share evenly."""
    if batch % world:
        raise UserError(
            f"batch={batch} (trainer.grpo.num_prompts_per_grpo_step, or model.global_batch_size in SFT) is not "
            f"divisible by world={world}, the data-parallel size: make it a multiple"
        )


def shuffled(count: int, seed: str) -> list[int]:
    """Indices in an order that the seed alone decides."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


class InOrder:
    """Indices as they come, each once, in global batches of which this rank takes its slice.

    Args:
        batch: size of a global batch, over all ranks.
        rank, world: this rank's place among the data-parallel ranks.
    """

    def __init__(self, batch: int, rank: int, world: int):
        self.batch, self.rank, self.world, self._drawn = batch, rank, world, 0

    def next(self) -> list[int]:
        """This rank's indices of the next global batch."""
        share = self.batch // self.world
        first = self._drawn + self.rank * share
        self._drawn += self.batch
        return list(range(first, first + share))

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._drawn = state["drawn"]
