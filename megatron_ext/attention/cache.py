"""Records of the forward passes of sampling: what a pass writes into pages of keys and values, and what its rows read.

Prefill runs prompts, and what is known of their responses, as one packed stream with attention as in training. Decoding runs
one row per response, or several where it has observed tokens; each row sees its prompt's pages and its own up to itself. Rotated
keys are kept, so positions never have to be worked out again.

Shape legend: t rows of the prefill's stream, r decode rows (padding rows at the end), n query and m key/value heads of this
tensor-parallel rank, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.attention.function import prefix_grouped_attention
from megatron_ext.attention.kernels import Kernel, Scoring, select_kernel
from megatron_ext.attention.paged import StepReads, Stretch, paged_attention, plain_way
from megatron_ext.attention.pages import PAGE, PagePool, Table
from megatron_ext.grouping import PrefixGroups

__all__ = ["DecodeStep", "PrefillStep", "Row"]


class _Step(PackedSeqParams):
    """A record that is no stream of documents: Megatron must only carry it to the core attention. It holds until pages move."""

    def __init__(self, pool: PagePool | None):
        super().__init__(qkv_format="sbhd")
        self.pool = pool


class PrefillStep(_Step):
    """Record of a forward pass over prompts.

    Args:
        groups: of the stream.
        pool: where keys and values are kept; None: nowhere.
        kept: (first row of the stream, rows, table): what is kept of it, from the table's beginning on.
    """

    def __init__(self, groups: PrefixGroups, pool: PagePool | None = None, kept: Sequence[tuple[int, int, Table]] = ()):
        super().__init__(pool)
        self.groups, self.kept = groups, kept
        self._where: tuple[Tensor, Tensor] | None = None

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scoring: Scoring,
        attention_kernel: str = "auto",
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q [t, n, d], k and v [t, m, d], sinks [n] -> [t, n, d]."""
        self.keep(layer, k, v)
        return prefix_grouped_attention(q, k, v, self.groups, scoring, attention_kernel, sinks=sinks)

    def keep(self, layer: int, *x: Tensor) -> None:
        """Write keys and values, or compressed rows, [t, m, d] each, to the pages of what is kept."""
        if self.kept:
            if self._where is None:
                self._where = self._places(x[0])
            rows, flat = self._where
            self.pool.write(layer, flat, *(each.index_select(0, rows) for each in x))

    def _places(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that are kept, and where."""
        rows = [np.arange(start, start + count) for start, count, _ in self.kept]
        within = [np.arange(count) for _, count, _ in self.kept]
        pages = [
            np.asarray(self.pool.place(table), dtype=np.int64)[place // PAGE]
            for place, (_, _, table) in zip(within, self.kept, strict=True)
        ]
        found = (np.concatenate(x) for x in (rows, pages, [place % PAGE for place in within]))
        rows, pages, offsets = (torch.from_numpy(x).to(key.device) for x in found)
        return rows, self.pool.flat_rows(pages, offsets, key.size(1))


@dataclass(frozen=True)
class Row:
    """One token of a response in a decoding step.

    Attributes:
        prompt, own: pages of its prompt and of what it has said; `own` has room for the token that is run.
        prompt_length: tokens of the prompt.
        length: tokens of its own, up to that one.
    """

    prompt: Table
    own: Table
    prompt_length: int
    length: int


class DecodeStep(_Step):
    """Record of one decoding step. The first rows of the stream are these; the others are padding. Rows of one response are
    neighbours, in order, and none of its tokens before them is missing in its pages.

    Args:
        before: the last step over this pool, whose stretches are taken where the same responses run on the same pages.
    """

    def __init__(self, pool: PagePool, rows: Sequence[Row], before: DecodeStep | None = None):
        super().__init__(pool)
        self.rows, self._changes = rows, pool.changes
        self._written: Tensor | None = None
        self._reads: dict[tuple[int | None, bool], StepReads] = {}
        if before is not None and before._serves(self):
            self._stretches = before._stretches
            return
        self._readers: dict[Table, list[int]] = {}  # rows of each response
        self._prompt_readers: dict[Table, list[int]] = {}
        for i, row in enumerate(rows):
            self._readers.setdefault(row.own, []).append(i)
            self._prompt_readers.setdefault(row.prompt, []).append(i)
        stretches = [self._own(), *self._of_several(), self._shared()]
        self._stretches = [stretch for stretch in stretches if len(stretch.rows)]

    def _serves(self, later: DecodeStep) -> bool:
        """Whether a later step reads the same pages by the same rows."""
        return (
            self.pool is later.pool and self._changes == later._changes and len(self.rows) == len(later.rows)
            and all(a.own is b.own for a, b in zip(self.rows, later.rows, strict=True))
        )  # fmt: skip

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scoring: Scoring,
        attention_kernel: str = "auto",
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q [r + pad, n, d], k and v [r + pad, m, d], sinks [n] -> [r + pad, n, d]; the pad rows come back zero."""
        keys, values = self._write(layer, k, v)
        kernel = select_kernel(attention_kernel, q.device, scoring)
        return self._read(q, keys, values, scoring, kernel, not plain_way(kernel), sinks)

    def attend_latent(
        self, layer: int, q: Tensor, rows: Tensor, width: int, scoring: Scoring, sinks: Tensor | None = None
    ) -> Tensor:
        """Over compressed rows, which are one key head of all, and by their first channels its values. Kernels have no heads so
        wide: it goes the plain way on every device.

        Args:
            q: [r + pad, n, d], absorbed.
            rows: [r + pad, 1, d], of these tokens.
            width: channels of a value.

        Returns:
            [r + pad, n, width].
        """
        (keys,) = self._write(layer, rows)
        kernel = select_kernel("blockwise", q.device, scoring)
        return self._read(q, keys, keys[..., :width], scoring, kernel, False, sinks)

    def _write(self, layer: int, *x: Tensor) -> tuple[Tensor, ...]:
        """[r + pad, m, d] each of the tokens that run; the layer's memory."""
        if self._written is None:
            at = [(self.pool.place(row.own)[(row.length - 1) // PAGE], (row.length - 1) % PAGE) for row in self.rows]
            self._written = self.pool.flat_rows(*torch.tensor(at).to(x[0].device).unbind(1), x[0].size(1))
        self.pool.write(layer, self._written, *(each[: len(self.rows)] for each in x))
        return self.pool.memory(layer, *x)

    def _read(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scoring: Scoring,
        kernel: Kernel,
        whole_apart: bool,
        sinks: Tensor | None,
    ) -> Tensor:
        count = len(self.rows)
        reads = self._of_window(scoring.window, whole_apart, q[:count], keys.size(2))
        out = paged_attention(q[:count], keys, values, reads, kernel, scoring, sinks)
        return out if count == len(q) else torch.nn.functional.pad(out, (0, 0, 0, 0, 0, len(q) - count))

    def _of_window(self, window: int | None, whole_apart: bool, query: Tensor, num_kv_heads: int) -> StepReads:
        key = (window, whole_apart)
        if key not in self._reads:
            places = np.array([row.prompt_length + row.length - 1 for row in self.rows])
            found = [x for s in self._stretches for x in s.reads(places, window, whole_apart, query.device)]
            self._reads[key] = StepReads.of(found, query, num_kv_heads)
        return self._reads[key]

    def _own(self) -> Stretch:
        """The pages of responses, each read by one row. Those that several read are holes here."""
        count = self.pool.bottom.high
        rows, start = np.full((count, 1), -1), np.zeros(count, dtype=np.int64)
        single = [mine[0] for mine in self._readers.values() if len(mine) == 1]
        pages = np.array([page for row in single for page in self.rows[row].own.pages], dtype=np.int64)
        counts = np.array([len(self.rows[row].own.pages) for row in single], dtype=np.int64)
        row_of = np.repeat(np.array(single, dtype=np.int64), counts)
        number = np.arange(len(pages)) - np.repeat(counts.cumsum() - counts, counts)  # of each page in its response
        rows[pages, 0] = row_of
        start[pages] = np.array([row.prompt_length for row in self.rows])[row_of] + PAGE * number
        return Stretch(0, rows, start, np.full(count, np.iinfo(np.int64).max))

    def _of_several(self) -> list[Stretch]:
        """The pages of responses that run several tokens, and those of their prompts, apart from others: more rows read them."""
        observing = [mine for mine in self._readers.values() if len(mine) > 1]
        if not observing:
            return []
        own, prompts, open_end = [], [], np.iinfo(np.int64).max
        for mine in observing:
            row = self.rows[mine[0]]
            own += [(page, mine, row.prompt_length + PAGE * i, open_end) for i, page in enumerate(row.own.pages)]
        for table in dict.fromkeys(self.rows[mine[0]].prompt for mine in observing):
            mine = self._prompt_readers[table]
            stop = self.rows[mine[0]].prompt_length
            prompts += [(page, mine, PAGE * i, stop) for i, page in enumerate(self.pool.place(table))]
        return [_apart(own), _apart(prompts)]

    def _shared(self) -> Stretch:
        """The pages of prompts, each read by the rows of all responses that are decoded. Those of which a response runs several
        tokens are holes here."""
        observing = {self.rows[mine[0]].prompt for mine in self._readers.values() if len(mine) > 1}
        readers = {table: mine for table, mine in self._prompt_readers.items() if table not in observing}
        count, first = self.pool.top.high, self.pool.capacity - self.pool.top.high
        rows = np.full((count, max(map(len, readers.values()), default=1)), -1)
        start, stop = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        for table, mine in readers.items():
            at = np.array(self.pool.place(table)) - first
            rows[at, : len(mine)] = mine
            start[at] = PAGE * np.arange(len(at))
            stop[at] = self.rows[mine[0]].prompt_length
        return Stretch(first, rows, start, stop)


def _apart(pages: Sequence[tuple[int, list[int], int, int]]) -> Stretch:
    """Of pages that do not lie side by side: (number, rows that read it, place of its first key, place behind its last)."""
    numbers, readers, start, stop = zip(*pages, strict=True)
    longest = max(map(len, readers))
    rows = np.array([[*mine, *[-1] * (longest - len(mine))] for mine in readers])
    return Stretch(0, rows, np.array(start), np.array(stop), np.array(numbers))
