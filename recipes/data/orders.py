"""In which order the rows of one set come in an epoch: shuffled, shuffled with what belongs together, or block by block."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from itertools import accumulate

__all__ = ["BlockShuffle", "PlainShuffle", "Shuffle", "TogetherShuffle", "shuffled"]


def shuffled(count: int, seed: str) -> list[int]:
    """Indices in an order that the seed alone decides."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


class Shuffle(ABC):
    """
    Attributes:
        count: of rows.
    """

    count: int

    @abstractmethod
    def order(self, seed: str) -> Sequence[int]:
        """All indices, each once, in an order that the seed alone decides."""


class PlainShuffle(Shuffle):
    """Any order."""

    def __init__(self, count: int):
        self.count = count

    def order(self, seed: str) -> list[int]:
        return shuffled(self.count, seed)


class TogetherShuffle(Shuffle):
    """Any order in which rows with the same key come one behind the other.

    Args:
        keys: of the rows.
    """

    def __init__(self, keys: Sequence[Hashable]):
        self.count = len(keys)
        groups: dict[Hashable, list[int]] = {}
        for row, key in enumerate(keys):
            groups.setdefault(key, []).append(row)
        self._groups = list(groups.values())

    def order(self, seed: str) -> list[int]:
        """Of the rows of a key any order, too."""
        rng, order = random.Random(seed), []
        for number in rng.sample(range(len(self._groups)), len(self._groups)):
            group = self._groups[number]
            order += rng.sample(group, len(group))
        return order


class BlockShuffle(Shuffle):
    """Any order of blocks of rows that follow each other, and of the rows of some blocks that come together: to be read one
    window of blocks after the other.

    Args:
        sizes: rows of each block.
        window: blocks whose rows are shuffled with one another.
    """

    def __init__(self, sizes: Sequence[int], window: int):
        self.sizes, self.window, self.count = sizes, window, sum(sizes)
        self.first = [0, *accumulate(sizes)]

    def order(self, seed: str) -> BlockOrder:
        return BlockOrder(self, seed)

    def block_of(self, row: int) -> int:
        return bisect_right(self.first, row) - 1


class BlockOrder(Sequence):
    """An epoch of a `BlockShuffle`, of which one window is in memory."""

    def __init__(self, shuffle: BlockShuffle, seed: str):
        self._shuffle, self._seed = shuffle, seed
        blocks = shuffled(len(shuffle.sizes), seed)
        self._windows = [blocks[i : i + shuffle.window] for i in range(0, len(blocks), shuffle.window)]
        self._ends = list(accumulate(sum(shuffle.sizes[b] for b in window) for window in self._windows))
        self._held: tuple[int, list[int]] = -1, []

    def __len__(self) -> int:
        return self._shuffle.count

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        number = bisect_right(self._ends, place)
        if self._held[0] != number:
            first, sizes = self._shuffle.first, self._shuffle.sizes
            rows = [row for b in self._windows[number] for row in range(first[b], first[b] + sizes[b])]
            random.Random(f"{self._seed}/{number}").shuffle(rows)
            self._held = number, rows
        rows = self._held[1]
        return rows[place - self._ends[number] + len(rows)]
