"""Context parallelism, on paper: which rank holds which rows of a stream, and each rank's attention plan.

What others need is cut evenly, what nobody else needs stays whole:

- a *shared* document (a prefix: rows below it see it) is cut into 2c chunks, and rank i holds chunks i and 2c - 1 - i,
  so that every rank has as much causal attention over it as every other;
- a response stays whole on one rank, placed by load; only one longer than a rank's share is cut like a prefix.

Only keys and values of cut documents travel: P rows of each prefix, never G P and never the whole stream. Everything
here is Python ints, worked out from lengths alone and alike on every rank.

Vocabulary: a *document* is a node of the plan (a prefix, a response, or a prefix with its only response); a *span* is
some of its rows, one after the other, on one rank. A rank's keys lie in one buffer: [gathered rows of cut documents |
own rows].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_ext.attention.plan import (
    Call,
    Document,
    Plan,
    Rectangle,
    Span,
    binding,
    documents,
    one_call_plan,
)
from megatron_ext.prefix_tree import causal_pairs

__all__ = ["ContextLayout", "shard_layout"]


@dataclass(frozen=True)
class ContextLayout:
    """Rows of a stream over the ranks of a context-parallel group.

    Attributes:
        spans: of each rank, in stream order.
        num_rows: of each rank, without its pad.
        cut: cut documents, in stream order; their rows are gathered, in this order.
        documents: all documents of the stream, without the stream's own pad, which is not distributed.
    """

    documents: tuple[Document, ...]
    cut: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]
    num_rows: tuple[int, ...]

    @cached_property
    def gathered_start(self) -> dict[int, int]:
        """First row of each cut document among the gathered rows."""
        starts, row = {}, 0
        for number in self.cut:
            starts[number] = row
            row += self.documents[number].length
        return starts

    @cached_property
    def num_gathered(self) -> int:
        return sum(self.documents[number].length for number in self.cut)

    def plan(self, rank: int, num_pad: int, window: int | None = None) -> Plan:
        """Attention of the rank's own rows over its key buffer.

        At most one call more than the unsharded plan; one call where the window hides anything.
        """
        first_own, starts, cut = self.num_gathered, self.gathered_start, set(self.cut)
        row = self.num_rows[rank]
        pad = [Rectangle(row, num_pad, first_own + row, num_pad)] if num_pad else []
        window = binding(window, self.documents, num_pad)
        if window is not None:
            key_start = dict(starts)
            for span in self.spans[rank]:
                key_start.setdefault(span.document, first_own + span.local_start)  # whole, where it was not gathered
            return one_call_plan(self.documents, self.spans[rank], key_start, pad, window)
        own = [Rectangle(s.local_start, s.length, first_own + s.local_start, s.length) for s in self.spans[rank]]
        levels: list[list[Rectangle]] = []
        for span in self.spans[rank]:
            document = self.documents[span.document]
            seen = [(d, self.documents[d].length) for d in document.ancestors]
            if span.document in cut:
                seen.append((span.document, span.start - document.start))
            for level, (number, length) in enumerate(seen):
                if not length:
                    continue
                while len(levels) <= level:
                    levels.append([])
                _add(levels[level], Rectangle(span.local_start, span.length, starts[number], length))
        calls = [Call.of(own + pad, causal=True)] if own or pad else []
        return Plan((*calls, *(Call.of(level, causal=False) for level in levels if level)))


def _add(rectangles: list[Rectangle], new: Rectangle) -> None:
    """Append, or widen the last one: neighbouring rows that see the same keys are one query sequence."""
    if rectangles:
        last = rectangles[-1]
        if last.q_start + last.q_len == new.q_start and (last.k_start, last.k_len) == (new.k_start, new.k_len):
            rectangles[-1] = Rectangle(last.q_start, last.q_len + new.q_len, last.k_start, last.k_len)
            return
    rectangles.append(new)


@lru_cache(maxsize=32)
def shard_layout(trees: tuple, ranks: int, pairs_per_token: float) -> ContextLayout:
    """Spread a stream over `ranks` ranks.

    Args:
        trees: `PrefixGroups.trees`.
        pairs_per_token: cost of a token's linear layers, in query-key pairs of one layer's attention.
    """
    found = documents(trees)
    total = sum(d.length for d in found)
    share = -(-total // ranks)
    cut = tuple(n for n, d in enumerate(found) if d.rows_below or d.length > share)
    load = [0.0] * ranks
    holder: dict[int, int] = {}

    cost = [d.length * pairs_per_token + causal_pairs(d.position, d.length) for d in found]
    for number in cut:
        for rank in range(ranks):
            load[rank] += cost[number] / ranks
    whole = sorted(set(range(len(found))) - set(cut), key=lambda n: (-cost[n], n))
    for number in whole:  # the longest first, each to the rank that has least to do
        rank = min(range(ranks), key=lambda r: (load[r], r))
        holder[number] = rank
        load[rank] += cost[number]
    spans: list[list[Span]] = [[] for _ in range(ranks)]
    rows = [0] * ranks

    def place(rank: int, number: int, start: int, end: int) -> None:
        if end > start:
            spans[rank].append(Span(number, start, end - start, rows[rank]))
            rows[rank] += end - start

    for number, document in enumerate(found):
        if number in holder:
            place(holder[number], number, document.start, document.start + document.length)
            continue
        borders = [document.start + document.length * i // (2 * ranks) for i in range(2 * ranks + 1)]
        for rank in range(ranks):
            head, tail = rank, 2 * ranks - 1 - rank
            if head + 1 == tail:  # the last rank's chunks are neighbours: one span
                place(rank, number, borders[head], borders[tail + 1])
            else:
                place(rank, number, borders[head], borders[head + 1])
                place(rank, number, borders[tail], borders[tail + 1])
    return ContextLayout(found, cut, tuple(map(tuple, spans)), tuple(rows))
