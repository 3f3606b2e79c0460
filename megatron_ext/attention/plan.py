"""The attention plan: which query rows see which key rows, as a few calls of equal kind.

Attention over a prefix-grouped stream is a list of rectangles (query rows x key rows, full or causal) whose partial
results merge by log-sum-exp. A plan is that list, sorted into calls, made from lengths only. A kernel runs one call
at a time and never needs to know what the rectangles mean.

Two forms of plan give the same attention:

    levels    a call per level of the tree; shared keys are read where they lie, once for all rows below them
    one call  the keys that each document sees are copied next to each other, and nothing needs merging. It serves
              sliding windows, whose few shared keys differ from row to row, and prefixes so short that merging costs
              more than copying
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from megatron_ext.grouping import PrefixGroups
from megatron_ext.prefix_tree import PrefixTree

__all__ = [
    "Call",
    "Document",
    "Plan",
    "Rectangle",
    "Run",
    "Span",
    "binding",
    "documents",
    "one_call_plan",
    "plan_attention",
]


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

    A causal rectangle is aligned at its lower right corner: query i sees key j <= i + k_len - q_len. With a window it
    sees only the last `window` of them and the key at its own place, j >= i + k_len - q_len - window.

    Kernels keep in `cache` what they derive from a call, so that it lives as long as the call does.
    """

    runs: tuple[Run, ...]
    causal: bool
    window: int | None = None

    @classmethod
    def of(cls, rectangles: Sequence[Rectangle], causal: bool, window: int | None = None) -> Call:
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
        return cls(tuple(runs), causal, window)

    @cached_property
    def cache(self) -> dict:
        return {}

    @cached_property
    def banded(self) -> bool:
        """Causal, but not by plain squares: a window, or more keys than queries."""
        square = all(run.first.q_len == run.first.k_len for run in self.runs)
        return self.causal and (self.window is not None or not square)

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
        if not self.causal:
            return sum(run.count * run.first.q_len * run.first.k_len for run in self.runs)

        def seen_by_all(k_len: int) -> int:  # by queries at the places 0 .. k_len - 1
            full = k_len if self.window is None else min(k_len, self.window)
            return full * (full + 1) // 2 + (k_len - full) * (0 if self.window is None else self.window + 1)

        sizes = ((run.count, run.first) for run in self.runs)
        return sum(count * (seen_by_all(f.k_len) - seen_by_all(f.k_len - f.q_len)) for count, f in sizes)


@dataclass(frozen=True)
class Plan:
    """Calls over a buffer of keys.

    Attributes:
        calls: in the order in which partial results are merged. A query row is in the first one, or in none.
        copied: stretches (first row, length) of the keys that are copied back to back before the calls, which then
            count rows of the copy; None where the calls read the keys in place.
    """

    calls: tuple[Call, ...]
    copied: tuple[tuple[int, int], ...] | None = None

    @cached_property
    def cache(self) -> dict:
        return {}

    @property
    def num_scores(self) -> int:
        return sum(call.num_scores for call in self.calls)


def plan_attention(groups: PrefixGroups, window: int | None = None, one_call: bool = False) -> Plan:
    """Plan for a stream of prefix groups or trees.

    In the form of levels there are as many calls as the deepest tree has levels. The first covers each row exactly once
    as query and once as key: every node causal within itself. Call d + 1 lets all rows below a node of depth d see that
    node. They follow it in the stream, so they are ONE query sequence per node, whose keys are never repeated. A node
    with a single continuation forms one causal document with it, so a group with a single response needs no second call.

    Args:
        window: a row sees itself and at most this many rows before it on its path. Where it hides anything, the plan
            has one call.
        one_call: ask for the form with one call.
    """
    return _plan(groups.layout, window, one_call)


@lru_cache(maxsize=64)
def _plan(layout, window: int | None, one_call: bool) -> Plan:
    trees, num_pad = layout
    found = documents(trees)
    row = sum(tree.num_tokens for tree in trees)  # of the pad
    pad = [Rectangle(row, num_pad, row, num_pad)] if num_pad else []
    window = binding(window, found, num_pad)
    if one_call or window is not None:
        spans = [Span(n, d.start, d.length, d.start) for n, d in enumerate(found)]
        return one_call_plan(found, spans, {n: d.start for n, d in enumerate(found)}, pad, window)
    own = [Rectangle(d.start, d.length, d.start, d.length) for d in found]
    levels: list[list[Rectangle]] = []
    for d in found:
        if d.rows_below:
            depth = len(d.ancestors)
            if depth == len(levels):
                levels.append([])
            levels[depth].append(Rectangle(d.start + d.length, d.rows_below, d.start, d.length))
    return Plan((Call.of(own + pad, causal=True), *(Call.of(level, causal=False) for level in levels)))


def binding(window: int | None, found: Sequence[Document], num_pad: int) -> int | None:
    """The window, or None where every path is so short that it hides nothing."""
    longest = max((d.position + d.length for d in found), default=0)
    return window if window is not None and max(longest, num_pad) > window + 1 else None


@dataclass(frozen=True)
class Span:
    """Consecutive rows of a document: `start` in the stream, `local_start` among the queries of the rank that holds them."""

    document: int
    start: int
    length: int
    local_start: int


def one_call_plan(
    found: Sequence[Document],
    spans: Sequence[Span],
    key_start: Mapping[int, int],
    pad: Sequence[Rectangle],
    window: int | None,
) -> Plan:
    """The plan with one call: what each span sees of its path, copied back to back.

    Args:
        found: the stream's documents.
        spans: the rows that ask.
        key_start: row of each document's first row in the buffer of keys; every document on a span's path has one.
        pad: rectangles of rows that see themselves alone.
        window: as in `plan_attention`.
    """
    copied: list[tuple[int, int]] = []
    rectangles: list[Rectangle] = []
    num_keys = 0

    def copy(start: int, length: int) -> None:
        if copied and sum(copied[-1]) == start:
            copied[-1] = (copied[-1][0], copied[-1][1] + length)
        else:
            copied.append((start, length))

    for span in spans:
        document = found[span.document]
        first = document.position + span.start - document.start
        low, high = 0 if window is None else max(0, first - window), first + span.length
        for number in (*document.ancestors, span.document):
            d = found[number]
            start, end = max(low, d.position), min(high, d.position + d.length)
            if start < end:
                copy(key_start[number] + start - d.position, end - start)
        rectangles.append(Rectangle(span.local_start, span.length, num_keys, high - low))
        num_keys += high - low
    for r in pad:
        copy(r.k_start, r.k_len)
        rectangles.append(Rectangle(r.q_start, r.q_len, num_keys, r.k_len))
        num_keys += r.k_len
    in_place = copied == [(0, num_keys)]
    return Plan((Call.of(rectangles, True, window),) if rectangles else (), None if in_place else tuple(copied))


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
