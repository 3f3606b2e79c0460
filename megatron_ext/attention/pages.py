"""Keys and values of sampling in pages: memory follows what is written, and is given back page by page.

One pool for each layer. What one response reads (its own tokens) is taken from the bottom of the pool, what several do (a
prompt) from its top, so that either kind is one stretch of memory with few holes and is attended where it lies.

    0          bottom.high            capacity - top.high        capacity
    | own pages |        not taken yet        |  prompts' pages  |

Shape legend: p pages of the pool, w rows of a page, m key/value heads of this tensor-parallel rank, d head dimension.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["GROWTH", "PAGE", "PagePool", "Table", "pages_of"]

# Tokens of a page: larger ones waste more of a response's last page, smaller ones make more partial results to merge.
PAGE = 32
# The pool grows by this share of itself: what it holds beyond what is written.
GROWTH = 16


def pages_of(tokens: int) -> int:
    """Pages that so many tokens fill."""
    return -(-tokens // PAGE)


@dataclass(eq=False)
class Table:
    """The pages of one prompt or response, in order; numbers count from the end of the pool that they are taken from."""

    side: _Side
    pages: list[int] = field(default_factory=list)


class _Side:
    """One end of the pool."""

    def __init__(self):
        self.high = 0  # pages up to the outermost one that was taken
        self.holes: list[int] = []  # given back, below `high`
        self.tables: set[Table] = set()

    @property
    def used(self) -> int:
        return self.high - len(self.holes)

    def take(self) -> int:
        if self.holes:
            return heapq.heappop(self.holes)
        self.high += 1
        return self.high - 1

    def give(self, pages: list[int]) -> None:
        for page in pages:
            heapq.heappush(self.holes, page)
        if not self.used:
            self.high, self.holes = 0, []

    def compact(self) -> dict[int, int]:
        """Move the outermost pages into the holes; returns where each page that moves goes."""
        free = sorted(page for page in self.holes if page < self.used)
        moved = sorted(set(range(self.used, self.high)) - set(self.holes))
        moves = dict(zip(moved, free, strict=True))
        for table in self.tables:
            table.pages[:] = [moves.get(page, page) for page in table.pages]
        self.high, self.holes = self.used, []
        return moves


class PagePool:
    """
    Args:
        limit: pages that it may have; None: as many as are asked for.

    Attributes:
        capacity: pages that there is memory for.
        peak: the most that was ever used at once.
        changes: how often pages were taken, given back or moved: what was worked out of their places holds until then.
        layers: layer -> keys and values, each [p, w, m, d], or compressed rows alone. In memory the heads of a page come before
            its rows where kernels want one matrix for each head.
    """

    def __init__(self, limit: int | None = None, heads_first: bool = True):
        self.limit, self.heads_first = limit, heads_first
        self.capacity = self.peak = self.changes = 0
        self.bottom, self.top = _Side(), _Side()
        self.layers: dict[int, tuple[Tensor, ...]] = {}

    @property
    def used(self) -> int:
        return self.bottom.used + self.top.used

    def fits(self, pages: int) -> bool:
        return self.limit is None or self.used + pages <= self.limit

    def new(self, shared: bool) -> Table:
        """An empty table, of a prompt that several responses share or of one response."""
        side = self.top if shared else self.bottom
        table = Table(side)
        side.tables.add(table)
        return table

    def extend(self, table: Table, tokens: int, more: int = 0) -> None:
        """Pages for so many tokens in all. Ask `fits` before.

        Args:
            more: pages that others are about to be given: where memory grows, it grows once for all of them.
        """
        self.changes += 1
        while len(table.pages) < pages_of(tokens):
            table.pages.append(table.side.take())
        assert self.limit is None or self.used <= self.limit, "more pages than there may be"
        self.peak = max(self.peak, self.used)
        if self.bottom.high + self.top.high > self.capacity:
            self._make_room(table.side, more)

    def free(self, table: Table) -> None:
        """Give its pages back."""
        self.changes += 1
        table.side.tables.remove(table)
        table.side.give(table.pages)
        table.pages = []

    def tidy(self) -> None:
        """Close holes where they are so many that attention would spend its time on them."""
        for side in (self.bottom, self.top):
            if len(side.holes) > 8 + side.used // 4:
                self._compact(side)

    def place(self, table: Table) -> list[int]:
        """Where its pages lie in the pool."""
        return table.pages if table.side is self.bottom else [self.capacity - 1 - page for page in table.pages]

    def memory(self, layer: int, *like: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of a layer, or what else is kept.

        Args:
            like: [t, m, d] of each.
        """
        if layer not in self.layers:
            self.layers[layer] = tuple(self._zeros((self.capacity, PAGE, *x.shape[1:]), x) for x in like)
        return self.layers[layer]

    def flat_rows(self, pages: Tensor, offsets: Tensor, heads: int) -> Tensor:
        """int64 [x * heads] or [x]: where tokens lie that have these pages and places in them [x], for `write`."""
        if not self.heads_first:
            return pages * PAGE + offsets
        head = torch.arange(heads, device=pages.device)
        return ((pages.unsqueeze(1) * heads + head) * PAGE + offsets.unsqueeze(1)).flatten()

    def write(self, layer: int, flat_rows: Tensor, *rows: Tensor) -> None:
        """Keys and values [x, m, d] of tokens, by one index for whole rows of memory: several for parts of them take longer."""
        for memory, x in zip(self.memory(layer, *rows), rows, strict=True):
            if self.heads_first:
                memory.transpose(1, 2).flatten(0, 2).index_copy_(0, flat_rows, x.reshape(-1, x.size(2)))
            else:
                memory.flatten(0, 1).index_copy_(0, flat_rows, x)

    def _zeros(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Not empty: a key that nothing sees is multiplied by 0, and must be a number."""
        if self.heads_first:
            return like.new_zeros(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
        return like.new_zeros(shape)

    def _make_room(self, extended: _Side, more: int) -> None:
        """For pages that one side has just taken beyond its old ones; it had no holes then."""
        other = self.bottom if extended is self.top else self.top
        if other.holes:
            self._compact(other)
        if self.used > self.capacity:
            wanted = max(self.used + more, self.capacity + self.capacity // GROWTH)
            split = self.capacity - self.top.high if extended is self.bottom else self.bottom.high
            self._grow(wanted if self.limit is None else min(wanted, self.limit), split)

    def _grow(self, capacity: int, split: int) -> None:
        """Pages from `split` on stay at the end. One tensor after the other, so that at most one is there twice."""
        for layer in self.layers:
            grown = list(self.layers[layer])
            self.layers[layer] = grown
            for i, old in enumerate(grown):
                new = self._zeros((capacity, *old.shape[1:]), old)
                new[:split] = old[:split]
                new[capacity - self.capacity + split :] = old[split:]
                grown[i] = new
            del old, new
            self.layers[layer] = tuple(grown)
        self.capacity = capacity

    def _compact(self, side: _Side) -> None:
        self.changes += 1
        moves = side.compact()
        if not moves or not self.layers:
            return
        sign, offset = (1, 0) if side is self.bottom else (-1, self.capacity - 1)
        device = next(iter(self.layers.values()))[0].device
        source, target = ([offset + sign * page for page in pages] for pages in (moves, moves.values()))
        source, target = torch.tensor(source, device=device), torch.tensor(target, device=device)
        for pair in self.layers.values():
            for x in pair:
                x[target] = x[source]
