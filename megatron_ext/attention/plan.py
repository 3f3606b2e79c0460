"""The attention plan: which query rows see which key rows, as a few calls of equal kind.

Attention over a prefix-grouped stream is a list of rectangles (query rows x key rows, full or causal) whose partial
results merge by log-sum-exp. A plan is that list, sorted into calls, made from lengths only. A kernel runs one call
at a time and never needs to know what the rectangles mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_ext.grouping import PrefixGroups

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
    """Rectangles of one kind, none empty, with disjoint and ascending query rows."""

    rectangles: tuple[Rectangle, ...]
    causal: bool

    @property
    def num_scores(self) -> int:
        """Query-key pairs computed, a causal square counted as its lower half with the diagonal."""
        if self.causal:
            return sum(r.q_len * (r.q_len + 1) // 2 for r in self.rectangles)
        return sum(r.q_len * r.k_len for r in self.rectangles)

    def runs(self) -> Iterator[Run]:
        """Group neighbouring rectangles of equal size and even spacing."""
        return iter(_runs(self.rectangles))


@lru_cache(maxsize=64)
def _runs(rectangles: tuple[Rectangle, ...]) -> tuple[Run, ...]:
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
    return tuple(runs)


def plan_attention(groups: PrefixGroups) -> tuple[Call, ...]:
    """Plan for a prefix-grouped stream: every segment causal within itself, then suffixes against their prefix.

    The first call covers each row exactly once as query and once as key. A group with a single response is one
    causal document, so its prefix and suffix are fused and need no second call.
    """
    return _plan(groups.layout)


@lru_cache(maxsize=64)
def _plan(layout) -> tuple[Call, ...]:
    lengths, num_pad = layout
    documents, crossings, row = [], [], 0

    def document(length: int) -> None:
        nonlocal row
        if length:
            documents.append(Rectangle(row, length, row, length))
        row += length

    for prefix, suffixes in lengths:
        filled = [s for s in suffixes if s]
        if len(filled) <= 1:
            document(prefix + sum(filled))
            continue
        prefix_start = row
        document(prefix)
        if prefix:  # all suffixes of a group are one long query sequence: the prefix's keys are never repeated
            crossings.append(Rectangle(row, sum(filled), prefix_start, prefix))
        for s in filled:
            document(s)
    document(num_pad)
    calls = [Call(tuple(documents), causal=True)]
    if crossings:
        calls.append(Call(tuple(crossings), causal=False))
    return tuple(calls)
