"""The order in which rows of several sets are drawn: each set in epochs of its own, all in fixed shares."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from megatron_ext.errors import UserError
from recipes.data.digests import row_digest
from recipes.data.errors import DataError
from recipes.data.orders import PlainShuffle, Shuffle
from recipes.data.sampler import Sampler

__all__ = ["Joined", "MixedSampler", "Share"]


class Joined(Sequence):
    """Rows of several sets, one set behind the other; each row is made when it is asked for."""

    def __init__(self, sets: Iterable[Sequence[Any]]):
        self._sets = list(sets)
        self._ends = list(accumulate(map(len, self._sets)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        number = bisect_right(self._ends, place)
        rows = self._sets[number]
        return rows[place - self._ends[number] + len(rows)]


@dataclass(frozen=True)
class Share:
    """A set of rows in a mixture.

    Attributes:
        count: its rows.
        weight: of drawn rows, those of this set are to those of another as their weights; or one for each stage, 0 where the set
            is not drawn.
        epochs: how often its rows are drawn at most, after which the others go on without it; None: without end.
        shuffle: its rows; None: in any order.
        rows: their indices; None: those behind the sets before.
    """

    name: str
    count: int
    weight: float | Sequence[float]
    epochs: float | None = None
    shuffle: Shuffle | None = None
    rows: Sequence[int] | None = None

    @property
    def limit(self) -> float:
        """How many rows are drawn at most."""
        return float("inf") if self.epochs is None else round(self.epochs * self.count)

    def weight_in(self, stage: int) -> float:
        return self.weight if isinstance(self.weight, (int, float)) else self.weight[stage]


class MixedSampler(Sampler):
    """Indices of sets that stand one behind the other.

    The next row is of the set that is furthest behind its share (Webster's method): among the first n rows, for any n, each set
    has its share within a row or two, and no chance decides. A set is shuffled anew in every epoch of its own, and all of it is
    drawn before any row comes again. The position is how many rows of each set have been drawn.

    Args:
        batch: size of a global batch, over all ranks.
        steps: batches that will be drawn.
        stages: batches that each stage of the weights has, in which shares are counted anew; the last one goes on. Empty: there
            is one.
        options: of `Sampler`.

    Raises:
        UserError: the sets' epochs are fewer than the batches ask for.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        batch: int,
        steps: int,
        seed: int,
        rank: int,
        world: int,
        stages: Sequence[int] = (),
        **options: Any,
    ):
        super().__init__(batch, rank, world, **options)
        self.shares, self.seed, self._stages = tuple(shares), seed, list(accumulate(stages))[:-1]
        self._first = [sum(s.count for s in shares[:i]) for i in range(len(shares))]
        # Of each set, rows drawn, and those of them that have been taken in this stage; and batches.
        self._position = (0,) * len(shares), (0,) * len(shares), 0
        self._orders: dict[int, tuple[int, Sequence[int]]] = {}  # by set: the epoch, its order
        if (limit := sum(s.limit for s in shares)) < steps * batch:
            raise UserError(
                f"data.train_sets hold {limit:.0f} rows with their epochs, and {steps} steps of {batch} take {steps * batch}: "
                f"make it {int(limit) // batch} steps or less, or raise epochs of a set"
            )

    def _draw(self) -> tuple[list[int], tuple] | None:
        before, counted, batches = self._position
        stage = bisect_right(self._stages, batches)
        drawn, taken = list(before), list(counted)
        if batches in self._stages:
            taken = [0] * len(drawn)
        indices: list[int] = []
        misses, most = 0, 2 * sum(share.count for share in self.shares)
        while len(indices) < self.batch:
            behind = [
                ((taken[i] + 0.5) / share.weight_in(stage), i)
                for i, share in enumerate(self.shares)
                if drawn[i] < share.limit and share.weight_in(stage)
            ]
            if not behind:
                return None
            _, i = min(behind)
            index = self._row(i, drawn[i])
            drawn[i] += 1
            if self.keeps is None or self.keeps(index):
                indices.append(index)
                taken[i] += 1
                misses = 0
            elif (misses := misses + 1) > most:
                raise DataError(
                    f"all rows of {self.shares[i].name} are too long, or empty: there is nothing to train on"
                )
        return indices, (tuple(drawn), tuple(taken), batches + 1)

    def _row(self, i: int, drawn: int) -> int:
        share = self.shares[i]
        epoch, place = divmod(drawn, share.count)
        if self._orders.get(i, (None,))[0] != epoch:
            shuffle = share.shuffle or PlainShuffle(share.count)
            # A new table: one that is shared with a copy of this sampler stays as it is.
            self._orders = self._orders | {i: (epoch, shuffle.order(f"{self.seed}/{share.name}/{epoch}"))}
        row = self._orders[i][1][place]
        return self._first[i] + row if share.rows is None else share.rows[row]

    def state_dict(self) -> dict[str, Any]:
        drawn, taken, batches = self._position
        found = {s.name: [s.count, *counts] for s, *counts in zip(self.shares, drawn, taken, strict=True)}
        return {"seed": self.seed, "drawn": found, "batches": batches, "members": self._members}

    @cached_property
    def _members(self) -> dict[str, str]:
        """A digest of which rows each set has, where that is said."""
        return {s.name: row_digest(s.rows).hex() for s in self.shares if s.rows is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        here = {s.name: s.count for s in self.shares}
        there = {name: count for name, (count, *_) in state.get("drawn", {}).items()}
        if (here, self.seed) != (there, state.get("seed")):
            raise UserError(
                f"the saved order of the data was drawn from {there} with model.seed={state.get('seed')}, this run has {here} "
                f"and model.seed={self.seed}: continue with the same data.train_sets and model.seed"
            )
        if state.get("members", self._members) != self._members:
            raise UserError(
                "data.curriculum puts rows into other bins than when the run began, as its numbers or its file have changed: it "
                "would not be the same run; put them back, or choose a new folder"
            )
        counts = [state["drawn"][s.name][1:] for s in self.shares]  # one number of before sets could leave out rows
        self._go_to((tuple(c[0] for c in counts), tuple(c[-1] for c in counts), state.get("batches", 0)))
