"""Which rows a step takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from megatron_ext.errors import UserError
from recipes.data.errors import DataError
from recipes.data.orders import PlainShuffle, Shuffle

__all__ = ["EpochSampler", "InOrder", "Sampler", "check_share"]


class Sampler(ABC):
    """Indices of rows, in global batches of which this rank takes its slice. All ranks draw the same order.

    Args:
        batch: size of a global batch, over all ranks.
        rank, world: this rank's place among the data-parallel ranks.
        keeps: (index) -> whether the row is one to learn from, where that is not known before; another is drawn in its place.
    """

    def __init__(self, batch: int, rank: int, world: int, keeps: Callable[[int], bool] | None = None):
        check_share(batch, world)
        assert 0 <= rank < world, (rank, world)
        self.batch, self.rank, self.world, self.keeps = batch, rank, world, keeps
        self._position: tuple = ()
        self._next: tuple[list[int], tuple] | None = None  # what has been drawn and not taken yet

    @abstractmethod
    def _draw(self) -> tuple[list[int], tuple] | None:
        """The next global batch and the position behind it; None: there is none. Leaves this sampler as it is, what it keeps to
        be faster apart."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank and for every batch size and number of ranks."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""

    @property
    def mine(self) -> slice:
        """This rank's share of a global batch."""
        share = self.batch // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def has_next(self) -> bool:
        """Whether there are rows for another global batch."""
        self._next = self._next or self._draw()
        return self._next is not None

    def next_batch(self) -> list[int]:
        """All ranks' indices of the next global batch."""
        if not self.has_next():
            raise UserError(
                "all sets of data.train_sets have been drawn as often as their epochs say: raise epochs of one, or leave it out"
            )
        (indices, self._position), self._next = self._next, None
        return indices

    def next(self) -> list[int]:
        """This rank's indices of the next global batch."""
        return self.next_batch()[self.mine]

    def _go_to(self, position: tuple) -> None:
        self._position, self._next = position, None


class EpochSampler(Sampler):
    """Epoch after epoch without end, each in an order of its own. A batch that an epoch cannot fill is completed from the next
    one, so that every index is drawn once per epoch and none is left out.

    Args:
        rows: how many, or how they are shuffled.
        options: of `Sampler`.
    """

    def __init__(self, rows: int | Shuffle, batch: int, seed: int, rank: int, world: int, **options: Any):
        self.shuffle = PlainShuffle(rows) if isinstance(rows, int) else rows
        self.count, self.seed = self.shuffle.count, seed
        if self.count < 1 or batch < 1:
            raise UserError(
                f"there is nothing to draw: {self.count} rows in batches of {batch}; both must be at least 1"
            )
        super().__init__(batch, rank, world, **options)
        self._position = 0, 0  # epoch, and rows drawn of it
        self._order: tuple = ()  # an epoch and its order

    def _draw(self) -> tuple[list[int], tuple]:
        epoch, drawn = self._position
        indices: list[int] = []
        misses = 0
        while len(indices) < self.batch:
            if drawn == self.count:
                epoch, drawn = epoch + 1, 0
            part = self._of(epoch)[drawn : drawn + self.batch - len(indices)]
            drawn += len(part)
            kept = part if self.keeps is None else list(filter(self.keeps, part))
            misses = 0 if kept else misses + len(part)
            if misses > 2 * self.count:
                raise DataError("all rows are too long, or empty: there is nothing to train on")
            indices += kept
        return indices, (epoch, drawn)

    def _of(self, epoch: int):
        if self._order[:1] != (epoch,):
            self._order = epoch, self.shuffle.order(f"{self.seed}/{epoch}")
        return self._order[1]

    def state_dict(self) -> dict[str, int]:
        epoch, drawn = self._position
        return {"epoch": epoch, "drawn": drawn, "count": self.count, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for name, here in (("count", self.count), ("seed", self.seed)):
            if state[name] != here:
                raise UserError(
                    f"the saved order of the data was drawn with {name}={state[name]}, this run has {name}={here}: "
                    "continue with the same data file and model.seed"
                )
        self._go_to((state["epoch"], state["drawn"]))


def check_share(batch: int, world: int) -> None:
    """Refuse a global batch that data-parallel ranks cannot share evenly."""
    if batch % world:
        raise UserError(
            f"batch={batch} (trainer.grpo.num_prompts_per_grpo_step, or model.global_batch_size in SFT) is not "
            f"divisible by world={world}, the data-parallel size: make it a multiple"
        )


class InOrder(Sampler):
    """Indices as they come, each once. Whoever asks for more than there are is told when the run begins."""

    def __init__(self, batch: int, rank: int, world: int):
        super().__init__(batch, rank, world)
        self._position = (0,)

    def _draw(self) -> tuple[list[int], tuple]:
        (drawn,) = self._position
        return list(range(drawn, drawn + self.batch)), (drawn + self.batch,)

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self._position[0]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._go_to((state["drawn"],))
