"""Attention of single rows over pages of keys, where the pages lie: split by page, merged by log-sum-exp.

Every page is one block of a batched product with the rows that read it: a response's own page with one row, a prompt's page
with those of all its responses. Two ways give partial results (unnormalised output, maximum, sum):

    plain      matrix products in torch, fp32 or fp64. It masks, caps scores and slides windows. On the CPU it takes all pages
               in one batch, and is 1.5 to 3 times as fast as a flash kernel that has them in one piece
    a kernel   of `kernels`, on a GPU, for pages that are seen whole, also where they lie; the plain way then has the few that
               are seen in part, those that are being written and those at a window's edge

Shape legend: r rows, p pages of a stretch, g rows that read one page, w rows of a page, n query and m key/value heads of this
tensor-parallel rank, d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from megatron_ext.attention.function import planned_attention
from megatron_ext.attention.kernels import Kernel, Scoring
from megatron_ext.attention.merge import wide_dtype
from megatron_ext.attention.pages import PAGE
from megatron_ext.attention.plan import Call, Plan, Rectangle

__all__ = ["Reads", "StepReads", "Stretch", "paged_attention", "plain_way"]

HIDDEN = -1e30  # a score that no other is less than; -inf would make numbers of holes into none
# Scores so far below the largest weigh e ** -64 = 2e-28, which fp64 does not see beside 1, instead of nothing: exp of what
# underflows takes the CPU ten times as long.
FLOOR = -64.0


@dataclass(frozen=True, eq=False)
class Stretch:
    """Pages, and who reads them.

    Attributes:
        first: number of the first page in the pool, where they lie side by side.
        rows: int [p, g], -1 for nobody.
        start: int [p], the place on its path of each page's first key.
        stop: int [p], the place behind the last key that is there.
        pages: int [p], their numbers, where they do not lie side by side: then they are copied.
    """

    first: int
    rows: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    pages: np.ndarray | None = None

    def reads(self, places: np.ndarray, window: int | None, whole_apart: bool, device: torch.device) -> list[Reads]:
        """What is read of them.

        Args:
            places: int [r], the place of each row on its path; it sees that key and those before.
            window: as in `Scoring`.
            whole_apart: pages that are seen whole go to a kernel.
        """
        asks = np.append(places, -1)[self.rows]  # [p, g]: nobody is at -1, and sees nothing
        high = np.clip(np.minimum(asks + 1, self.stop[:, None]) - self.start[:, None], 0, PAGE)
        low = np.zeros_like(high) if window is None else np.clip(asks - window - self.start[:, None], 0, PAGE)
        seen = low < high
        if not whole_apart:
            return [Reads.of(self.first, self.pages, self.rows, low, high, len(places), device)] if seen.any() else []
        whole = (low == 0) & (high == PAGE)
        cut = seen & ~whole
        found = []
        if whole.any():
            rows = np.where(whole, self.rows, -1)
            # Neighbours with the same readers, as the pages of a prompt are, make one block: fewer results to merge.
            begins = np.flatnonzero(np.append(True, (rows[1:] != rows[:-1]).any(1)))
            lengths = tuple(np.diff(np.append(begins, len(rows))).tolist())
            found.append(Reads.of(self.first, self.pages, rows[begins], None, None, len(places), device, lengths))
        if cut.any():
            pages = np.flatnonzero(cut.any(1))
            rows = np.where(cut[pages], self.rows[pages], -1)
            numbers = pages if self.pages is None else self.pages[pages]
            found.append(Reads.of(self.first, numbers, rows, low[pages], high[pages], len(places), device))
        return found


@dataclass(frozen=True, eq=False)
class Reads:
    """Pages with the rows that read them, on the device.

    Attributes:
        first, count: the stretch, where the pages are taken where they lie.
        lengths: pages of each block, where neighbours are read as one; None: one each.
        pages: int64 [p]: they are copied instead.
        rows: int64 [p * g], r for nobody.
        asks: the same, with any row in place of nobody.
        low, high: int64 [p, g], first key that is seen and the one behind the last; None: all are.
    """

    first: int
    count: int
    group: int
    pages: Tensor | None
    rows: Tensor
    asks: Tensor
    low: Tensor | None
    high: Tensor | None
    lengths: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        first: int,
        pages: np.ndarray | None,
        rows: np.ndarray,
        low: np.ndarray | None,
        high: np.ndarray | None,
        num_rows: int,
        device: torch.device,
        lengths: tuple[int, ...] | None = None,
    ) -> Reads:
        """
        Args:
            pages: counted from `first`.
            rows: -1 for nobody.
        """
        flat = np.where(rows < 0, num_rows, rows).ravel()
        made = [flat, np.minimum(flat, num_rows - 1), low, high, None if pages is None else first + pages]
        sent = [
            None if x is None else torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(device) for x in made
        ]
        count = len(rows) if lengths is None else sum(lengths)
        return cls(first, count, rows.shape[1], sent[4], *sent[:4], lengths)

    @cached_property
    def call(self) -> Call:
        """Every block seen whole by its rows."""
        blocks = [
            Rectangle(i * self.group, self.group, end - PAGE * length, PAGE * length)
            for i, (length, end) in enumerate(zip(self.lengths, (PAGE * np.cumsum(self.lengths)).tolist(), strict=True))
        ]
        return Call.of(blocks, causal=False)

    @property
    def in_place(self) -> slice:
        return slice(self.first, self.first + self.count)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """[p, 1, g, 1, w]: 0 where a key is seen."""
        key = torch.arange(PAGE, device=self.rows.device)
        hidden = (key < self.low.unsqueeze(-1)) | (key >= self.high.unsqueeze(-1))
        return torch.zeros(hidden.shape, dtype=dtype, device=key.device).masked_fill_(hidden, HIDDEN)[:, None, :, None]


@dataclass(frozen=True, eq=False)
class StepReads:
    """All reads of a decoding step.

    Those of the plain way are one list of x query heads with a page each, in the order in which batched products have them: by
    read, page, key/value head, row and query head. What is done to scores is done to all of them at once.

    Attributes:
        whole: reads of a kernel.
        plain: other reads, with their `bias`.
        heads: int64 [x], row * n + query head, with row r for nobody.
        asks: the same, with any row in place of nobody.
        order, ends: int64 [x] and [(r + 1) * n + 1], the list sorted by `heads`, and where each of them begins in that.
        counts: query heads of each of `plain`.
    """

    whole: tuple[Reads, ...]
    plain: tuple[tuple[Reads, Tensor], ...]
    heads: Tensor | None
    asks: Tensor | None
    order: Tensor | None
    ends: Tensor | None
    counts: tuple[int, ...]

    @classmethod
    def of(cls, reads: Sequence[Reads], query: Tensor, num_kv_heads: int) -> StepReads:
        """
        Args:
            query: [r, n, d].
        """
        n = query.size(1)
        plain = [read for read in reads if read.low is not None]
        if not plain:
            return cls(tuple(reads), (), None, None, None, None, ())
        head = torch.arange(n, device=query.device).view(num_kv_heads, 1, -1)
        every = [(read.rows.view(-1, 1, read.group, 1) * n + head).flatten() for read in plain]  # [p, m, g, n / m]
        heads, wide = torch.cat(every), wide_dtype(query)
        ordered, order = heads.sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange((len(query) + 1) * n + 1, device=heads.device))
        return cls(
            tuple(read for read in reads if read.low is None), tuple((read, read.bias(wide)) for read in plain), heads,
            heads.clamp(max=len(query) * n - 1), order, ends, tuple(map(len, every)),
        )  # fmt: skip


def plain_way(kernel: Kernel) -> bool:
    """Whether pages are all read the plain way: where the kernel is for the CPU, or is plain itself."""
    return kernel.device != "cuda"


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reads: StepReads,
    kernel: Kernel,
    scoring: Scoring,
    sinks: Tensor | None = None,
) -> Tensor:
    """
    Args:
        query: [r, n, d].
        key, value: [pages, w, m, d]; the value of a compressed row, read the plain way, may have fewer channels, e.
        reads: each row is in one of them at least.
        sinks: [n], a logit for each head that joins once, when all parts of a row are there; None: there are none.

    Returns:
        [r, n, d or e] in query's dtype.
    """
    parts, rows = [], []
    for read in reads.whole:
        k, v = _pages(read, key, value)
        parts.append(_by_kernel(query.index_select(0, read.asks), k, v, read.call, kernel, scoring))
        rows.append(read.rows)
    if reads.plain:
        parts.append(_plain(query, key, value, reads, scoring))
        rows.append(torch.arange(len(query), device=query.device))
    if len(parts) == 1 and not reads.whole:
        ((out, largest, total),) = parts
        merged = out.div_(_with_sinks(total, largest, sinks).unsqueeze(-1))
    else:
        merged = _merged(query, rows, parts, sinks)
    return merged if merged.dtype == query.dtype else merged.to(query.dtype)


def _pages(read: Reads, *memory: Tensor) -> Iterator[Tensor]:
    return (x[read.in_place] if read.pages is None else x.index_select(0, read.pages) for x in memory)


def _with_sinks(total: Tensor, largest: Tensor, sinks: Tensor | None) -> Tensor:
    """Sums of exponentials [r, n] over the largest score, with the sinks' own. One far above it is infinite: nothing is seen."""
    return total if sinks is None else total + (sinks.to(largest.dtype) - largest).exp_()


def _merged(
    query: Tensor,
    rows: Sequence[Tensor],
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
    sinks: Tensor | None,
) -> Tensor:
    """Of parts (output [x, n, d], maximum [x, n], sum [x, n]) of rows [x]: what belongs to one row, on one scale, added up."""
    (r, n, _), d = query.shape, parts[0][0].size(-1)
    outs, maxima, sums = zip(*parts, strict=True)
    every, maximum, denominator = torch.cat(rows), torch.cat(maxima), torch.cat(sums)
    largest = maximum.new_full((r + 1, n), HIDDEN)  # the last row is nobody's
    largest.scatter_reduce_(0, every.unsqueeze(1).expand(-1, n), maximum, "amax")
    weight = maximum.sub_(largest.index_select(0, every)).exp_()
    total = weight.new_zeros(r + 1, n).index_add_(0, every, denominator.mul_(weight))
    merged = weight.new_zeros(r + 1, n, d)
    for index, out, share in zip(rows, outs, weight.split([len(x) for x in rows]), strict=True):
        merged.index_add_(0, index, out.mul_(share.unsqueeze(-1)))
    return merged[:r].div_(_with_sinks(total[:r], largest[:r], sinks).unsqueeze(-1))


def _plain(
    query: Tensor, key: Tensor, value: Tensor, reads: StepReads, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """Over all pages that are read the plain way: output [r, n, e], not divided by the sum, maximum and sum [r, n], as query
    wide. A row that reads none has nothing."""
    r, n, d = query.shape
    wide = wide_dtype(query)
    scaled = (query if query.dtype == wide else query.to(wide)) * scoring.scale
    asked = scaled.view(r * n, d).index_select(0, reads.asks)  # [x, d]
    scores, out = (asked.new_empty(len(asked), width) for width in (PAGE, value.size(-1)))
    values, begin = [], 0
    for (read, bias), count in zip(reads.plain, reads.counts, strict=True):
        k, v = (_matrices(x, wide) for x in _pages(read, key, value))  # [p * m, w, d]
        # A key/value head's queries are one matrix: those of all rows, and of all query heads that share its keys.
        mine = slice(begin, begin + count)
        q, s = (x[mine].view(len(k), -1, x.size(1)) for x in (asked, scores))
        torch.bmm(q, k.transpose(1, 2), out=s)
        if scoring.softcap is not None:
            s.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        s.view(read.count, -1, read.group, n // key.size(2), PAGE).add_(bias)
        values.append((v, mine))
        begin += count
    largest = scores.new_full(((r + 1) * n,), HIDDEN)  # the last row is nobody's
    largest.scatter_reduce_(0, reads.heads, scores.amax(-1), "amax")
    scores.sub_(largest.index_select(0, reads.heads).unsqueeze(-1)).clamp_(min=FLOOR).exp_()
    total = torch.zeros_like(largest).index_add_(0, reads.heads, scores.sum(-1))
    for v, mine in values:
        torch.bmm(scores[mine].view(len(v), -1, PAGE), v, out=out[mine].view(len(v), -1, out.size(-1)))
    # What index_add_ would do, row after row, in a seventeenth of its time on the CPU (6,144 rows of 32).
    merged = embedding_bag(reads.order, out, reads.ends, mode="sum", include_last_offset=True)
    return merged.view(r + 1, n, -1)[:r], largest.view(r + 1, n)[:r], total.view(r + 1, n)[:r]


def _matrices(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[p, w, m, d] -> [p * m, w, d]: of pages with heads first a view."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if x.dtype == dtype else x.to(dtype)


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, call: Call, kernel: Kernel, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """q [blocks * g, n, d], k and v [p, w, m, d], every block seen whole; output, maximum and sum."""
    out, lse = planned_attention(q, k.flatten(0, 1), v.flatten(0, 1), Plan((call,)), kernel, scoring)
    return out.to(lse.dtype), lse, torch.ones_like(lse)
