"""The attention plan: which query rows see which key rows, as a few calls of equal kind.

Attention over a prefix-grouped stream is a list of rectangles (query rows x key rows, full or causal) whose partial
results merge by log-sum-exp. A plan is that list, sorted into calls, made from lengths only. A kernel runs one call
at a time and never needs to know what the rectangles mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_ext.grouping import PrefixGroups
from megatron_ext.prefix_tree import PrefixTree

__all__ = ["Call", "Rectangle", "Run", "plan_attention"]


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
    documents: list[Rectangle] = []
    levels: list[list[Rectangle]] = []
    row = 0
    for tree in trees:
        for node, depth in _merge_chains(tree, row):
            documents.append(Rectangle(node.start, node.length, node.start, node.length))
            below = node.end - node.start - node.length
            if below:
                if depth == len(levels):
                    levels.append([])
                levels[depth].append(Rectangle(node.start + node.length, below, node.start, node.length))
        row += tree.num_tokens
    if num_pad:
        documents.append(Rectangle(row, num_pad, row, num_pad))
    return (Call.of(documents, causal=True), *(Call.of(level, causal=False) for level in levels))


@dataclass
class _Node:
    """Rows of one or more nodes that form one causal document, and the end of the rows below them."""

    start: int
    length: int
    end: int


def _merge_chains(tree: PrefixTree, first_row: int) -> list[tuple[_Node, int]]:
    """(node, depth) in stream order: empty nodes left out, a node with a single continuation joined with it."""
    place: dict[int, int] = {}  # tree node -> its entry in `merged`; of an empty one, its closest ancestor's
    merged: list[tuple[_Node, int]] = []
    for number, (length, parent) in enumerate(zip(tree.lengths, tree.parents, strict=True)):
        above = place.get(parent)
        start, end = first_row + tree.starts[number], first_row + tree.ends[number]
        if not length:
            if above is not None:
                place[number] = above
            continue
        if (
            above is not None
            and merged[above][0].end == end
            and merged[above][0].start + merged[above][0].length == start
        ):
            merged[above][0].length += length  # nothing else lies below the node above
            place[number] = above
            continue
        place[number] = len(merged)
        merged.append((_Node(start, length, end), 0 if above is None else merged[above][1] + 1))
    return merged
