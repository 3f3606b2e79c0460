"""The attention plan: which query rows see which key rows, as a few calls of equal kind.

Attention over a prefix-grouped stream is a list of rectangles (query rows x key rows, full or causal) whose partial
results merge by log-sum-exp. A plan is that list, sorted into calls, made from lengths only. A kernel runs one call
at a time and never needs to know what the rectangles mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from megatron_ext.grouping import PrefixGroups
from megatron_ext.prefix_tree import PrefixTree

__all__ = ["Call", "Document", "Rectangle", "Run", "documents", "plan_attention"]


@dataclass(frozen=True)
class Rectangle:
    """`q_len` query rows from `q_start` against `k_len` key rows from `k_start`."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int


@dataclass(frozen=True)
class Run:
    """`count` rectangles of one size whose starts are evenly spaced: a batch without gathering."""

    first: Rectangle
    count: int
    q_step: int
    k_step: int


@dataclass(frozen=True)
class Call:
    """Rectangles of one kind, none empty, with disjoint query rows, as runs of equal ones. Build it with `of`.

    Kernels keep in `cache` what they derive from a call, so that it lives as long as the call does.
    """

    runs: tuple[Run, ...]
    causal: bool

    @classmethod
    def of(cls, rectangles: Sequence[Rectangle], causal: bool) -> Call:
        """Group neighbouring rectangles of equal size and even spacing into runs."""
        runs: list[Run] = []
        for r in rectangles:
            last = runs[-1] if runs else None
            if last and (last.first.q_len, last.first.k_len) == (r.q_len, r.k_len):
                span = last.count - 1
                q_step = r.q_start - (last.first.q_start + span * last.q_step)
                k_step = r.k_start - (last.first.k_start + span * last.k_step)
                if last.count == 1 or (q_step, k_step) == (last.q_step, last.k_step):
                    runs[-1] = Run(last.first, last.count + 1, q_step, k_step)
                    continue
            runs.append(Run(r, 1, 0, 0))
        return cls(tuple(runs), causal)

    @cached_property
    def cache(self) -> dict:
        return {}

    @property
    def rectangles(self) -> tuple[Rectangle, ...]:
        return tuple(
            Rectangle(f.q_start + i * run.q_step, f.q_len, f.k_start + i * run.k_step, f.k_len)
            for run in self.runs
            for f in (run.first,)
            for i in range(run.count)
        )

    @property
    def num_scores(self) -> int:
        """Query-key pairs computed, a causal square counted as its lower half with the diagonal."""
        if self.causal:
            return sum(run.count * run.first.q_len * (run.first.q_len + 1) // 2 for run in self.runs)
        return sum(run.count * run.first.q_len * run.first.k_len for run in self.runs)


def plan_attention(groups: PrefixGroups) -> tuple[Call, ...]:
    """Plan for a stream of prefix groups or trees, in as many calls as the deepest tree has levels.

    The first call covers each row exactly once as query and once as key: every node causal within itself. Call d + 1
    lets all rows below a node of depth d see that node. They follow it in the stream, so they are ONE query sequence
    per node, whose keys are never repeated. A node with a single continuation forms one causal document with it, so a
    group with a single response needs no second call.
    """
    return _plan(groups.layout)


@lru_cache(maxsize=64)
def _plan(layout) -> tuple[Call, ...]:
    trees, num_pad = layout
    found = documents(trees)
    own = [Rectangle(d.start, d.length, d.start, d.length) for d in found]
    levels: list[list[Rectangle]] = []
    for d in found:
        if d.rows_below:
            depth = len(d.ancestors)
            if depth == len(levels):
                levels.append([])
            levels[depth].append(Rectangle(d.start + d.length, d.rows_below, d.start, d.length))
    if num_pad:
        row = sum(tree.num_tokens for tree in trees)
        own.append(Rectangle(row, num_pad, row, num_pad))
    return (Call.of(own, causal=True), *(Call.of(level, causal=False) for level in levels))


@dataclass(frozen=True)
class Document:
    """Rows that are causal within themselves: a node, or a node and its only continuation.

    Attributes:
        start, length: rows in the stream.
        rows_below: rows that follow and see all of these.
        position: of the first row, which is also how many rows it sees before it.
        ancestors: documents before it on its path, from the root on, as indices among all documents.
    """

    start: int
    length: int
    rows_below: int
    position: int
    ancestors: tuple[int, ...]


@lru_cache(maxsize=64)
def documents(trees: tuple[PrefixTree, ...]) -> tuple[Document, ...]:
    """The documents of a stream, in its order: empty nodes left out, a node with a single continuation joined with it."""
    found: list[Document] = []
    first_row = 0
    for tree in trees:
        place: dict[int, int] = {}  # node -> its document; of an empty node, its closest ancestor's
        for node, (length, parent) in enumerate(zip(tree.lengths, tree.parents, strict=True)):
            above = place.get(parent)
            start, end = first_row + tree.starts[node], first_row + tree.ends[node]
            if not length:
                if above is not None:
                    place[node] = above
                continue
            if above is not None:
                joined = found[above]
                if joined.start + joined.length == start and start + joined.rows_below == end:
                    place[node] = above
                    found[above] = replace(joined, length=joined.length + length, rows_below=end - start - length)
                    continue
            place[node] = len(found)
            ancestors = () if above is None else (*found[above].ancestors, above)
            found.append(Document(start, length, end - start - length, tree.first_positions[node], ancestors))
        first_row += tree.num_tokens
    return tuple(found)
