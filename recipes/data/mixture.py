"""The order in which rows of several sets are drawn: each set in epochs of its own, all in fixed shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.errors import UserError
from recipes.data.sampler import EpochSampler, check_share, shuffled
from recipes.data.settings import TrainSetSection

__all__ = ["MixedSampler", "Share", "draw_order"]


@dataclass(frozen=True)
class Share:
    """A set of rows in a mixture.

    Attributes:
        count: its rows.
        weight: of drawn rows, those of this set are to those of another as their weights.
        epochs: how often its rows are drawn at most, after which the others go on without it; None: without end.
    """

    name: str
    count: int
    weight: float
    epochs: float | None = None

    @property
    def limit(self) -> float:
        """How many rows are drawn at most."""
        return float("inf") if self.epochs is None else round(self.epochs * self.count)


class MixedSampler:
    """Indices of sets that stand one behind the other, in global batches of which this rank takes its slice.

    The next row is of the set that is furthest behind its share (Webster's method): among the first n rows, for any n, each set
    has its share within a row or two, and no chance decides. A set is shuffled anew in every epoch of its own, and all of it is
    drawn before any row comes again. The position is how many rows of each set have been drawn.

    Args:
        batch: size of a global batch, over all ranks.
        steps: batches that will be drawn.
        rank, world: this rank's place among the data-parallel ranks.

    Raises:
        UserError: the sets' epochs are fewer than the batches ask for.
    """

    def __init__(self, shares: Sequence[Share], batch: int, steps: int, seed: int, rank: int, world: int):
        check_share(batch, world)
        assert 0 <= rank < world, (rank, world)
        self.shares, self.batch, self.seed, self.rank, self.world = tuple(shares), batch, seed, rank, world
        self._first = [sum(s.count for s in shares[:i]) for i in range(len(shares))]
        self._drawn = (0,) * len(shares)
        self._orders: dict[int, tuple[int, list[int]]] = {}  # by set: the epoch, its order
        if (limit := sum(s.limit for s in shares)) < steps * batch:
            raise UserError(
                f"data.train_sets hold {limit:.0f} rows with their epochs, and {steps} steps of {batch} take {steps * batch}: "
                f"make it {int(limit) // batch} steps or less, or raise epochs of a set"
            )

    def next(self) -> list[int]:
        """This rank's indices of the next global batch."""
        drawn, indices = list(self._drawn), []
        for _ in range(self.batch):
            left = [i for i, share in enumerate(self.shares) if drawn[i] < share.limit]
            if not left:
                raise UserError(
                    "all sets of data.train_sets have been drawn as often as their epochs say: raise epochs of one, or leave "
                    "it out"
                )
            i = min(left, key=lambda i: self._behind(i, drawn[i]))
            indices.append(self._first[i] + self._row(i, drawn[i]))
            drawn[i] += 1
        self._drawn = tuple(drawn)
        share = self.batch // self.world
        return indices[self.rank * share : (self.rank + 1) * share]

    def _behind(self, i: int, drawn: int) -> tuple[float, int]:
        return (drawn + 0.5) / self.shares[i].weight, i

    def _row(self, i: int, drawn: int) -> int:
        share = self.shares[i]
        epoch, place = divmod(drawn, share.count)
        if self._orders.get(i, (None,))[0] != epoch:
            # A new table: one that is shared with a copy of this sampler stays as it is.
            self._orders = self._orders | {i: (epoch, shuffled(share.count, f"{self.seed}/{share.name}/{epoch}"))}
        return self._orders[i][1][place]

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank and for every batch size and number of ranks."""
        drawn = {s.name: [s.count, drawn] for s, drawn in zip(self.shares, self._drawn, strict=True)}
        return {"seed": self.seed, "drawn": drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        here = {s.name: s.count for s in self.shares}
        there = {name: count for name, (count, _) in state.get("drawn", {}).items()}
        if (here, self.seed) != (there, state.get("seed")):
            raise UserError(
                f"the saved order of the data was drawn from {there} with model.seed={state.get('seed')}, this run has {here} "
                f"and model.seed={self.seed}: continue with the same data.train_sets and model.seed"
            )
        self._drawn = tuple(state["drawn"][s.name][1] for s in self.shares)


def draw_order(
    sets: Mapping[str, Sequence[Any]],
    sections: Mapping[str, TrainSetSection],
    batch: int,
    steps: int,
    seed: int,
    *place: int,
) -> EpochSampler | MixedSampler:
    """How rows of sets are drawn that stand one behind the other.

    Args:
        sets: rows by name; "" is that of data.train_path, which is the only one.
        sections: what the configuration says of them.
        place: rank and world.
    """
    if "" in sets:
        return EpochSampler(len(sets[""]), batch, seed, *place)
    shares = []
    for name, rows in sets.items():
        section = sections[name]
        weight = len(rows) * (section.epochs or 1) if section.weight is None else section.weight
        shares.append(Share(name, len(rows), weight, section.epochs))
    return MixedSampler(shares, batch, steps, seed, *place)
