"""How kernels lay out the rows of a call: a *piece* is what one launch computes.

    StridedPiece   a `Run`, viewed as [b, n, s, d] without copying (CPU)
    PackedPiece    a whole call, rows packed as [rows, n, d] with cu_seqlens (CUDA)

Shape legend: t rows of the stream, n heads, d head dimension, b rectangles of a run, s rows of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from megatron_ext.attention.plan import Call, Rectangle, Run

__all__ = ["PackedPiece", "StridedPiece", "packed_pieces", "strided_pieces"]


class StridedPiece:
    """A run of equal rectangles as a [b, n, s, d] (or [b, n, s] for lse) view of a [t, n, d] ([t, n]) tensor.

    Attributes:
        causal: plain squares, the lower half of each.
        banded: what is visible is given by `mask` alone.
    """

    def __init__(self, run: Run, causal: bool, window: int | None = None):
        first = run.first
        self.run = run
        self.window = window if window is not None and first.k_len > window + 1 else None  # else it hides nothing
        self.causal = causal and first.q_len == first.k_len and self.window is None
        self.banded = causal and not self.causal and (self.window is not None or first.q_len > 1)

    def mask(self, like: Tensor) -> Tensor | None:
        """[q_len, k_len] of zeros where the key is visible and -inf where it is not; None where all are."""
        if not (self.causal or self.banded):
            return None
        size = (self.run.first.q_len, self.run.first.k_len)
        if self.window is None:  # every block has its own shape, and kept they would fill the memory
            return _band(*size, None, like.dtype, like.device)
        return _window_band(*size, self.window, like.dtype, like.device)

    def _view(self, x: Tensor, start: int, length: int, step: int) -> Tensor:
        row, *rest = x.stride()
        shape = (self.run.count, x.size(1), length, *x.shape[2:])
        return x.as_strided(shape, (step * row, rest[0], row, *rest[1:]), x.storage_offset() + start * row)

    def take_q(self, x: Tensor) -> Tensor:
        return self._view(x, self.run.first.q_start, self.run.first.q_len, self.run.q_step)

    def take_k(self, x: Tensor) -> Tensor:
        return self._view(x, self.run.first.k_start, self.run.first.k_len, self.run.k_step)

    def put_q(self, x: Tensor, value: Tensor) -> None:
        self.take_q(x).copy_(value)

    def add_q(self, x: Tensor, value: Tensor) -> None:
        self.take_q(x).add_(value)

    def put_k(self, x: Tensor, value: Tensor) -> None:
        self.take_k(x).copy_(value)

    def add_k(self, x: Tensor, value: Tensor) -> None:
        self.take_k(x).add_(value)


def _band(q_len: int, k_len: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    own = torch.arange(k_len - q_len, k_len, device=device)[:, None]  # the query's own place
    key = torch.arange(k_len, device=device)
    hidden = key > own
    if window is not None:
        hidden |= key < own - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


_window_band = lru_cache(maxsize=32)(_band)  # blocks of a window are all alike


def strided_pieces(call: Call, block: int, always: bool = False) -> Sequence[StridedPiece]:
    """A call's runs; banded ones (or, with `always`, all) cut into blocks of that many queries.

    A block is given no key that none of its queries sees, so the work of a window grows with its width and not with the
    sequence.
    """
    key = ("strided", block, always)
    if key not in call.cache:
        cut = call.banded or always
        call.cache[key] = tuple(
            StridedPiece(part, call.causal, call.window)
            for run in call.runs
            for part in (_blocks(run, call, block) if cut else (run,))
        )
    return call.cache[key]


def _blocks(run: Run, call: Call, block: int) -> list[Run]:
    first, found = run.first, []
    before = first.k_len - first.q_len
    for start in range(0, first.q_len, block):
        length = min(block, first.q_len - start)
        low, high = 0, first.k_len
        if call.causal:
            high = before + start + length
            low = 0 if call.window is None else max(0, before + start - call.window)
        rectangle = Rectangle(first.q_start + start, length, first.k_start + low, high - low)
        found.append(Run(rectangle, run.count, run.q_step, run.k_step))
    return found


class PackedPiece:
    """All rectangles of a call with their rows packed back to back: [rows, n, d], cu_seqlens beside them.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 [rectangles + 1], on the device.
        max_seqlen_q, max_seqlen_k: ints.
    """

    def __init__(self, call: Call, device: torch.device):
        self.causal, self.window = call.causal, call.window
        q = [(run.first.q_start, run.first.q_len, run.q_step, run.count) for run in call.runs]
        k = [(run.first.k_start, run.first.k_len, run.k_step, run.count) for run in call.runs]
        self.q_rows, self.k_rows = _rows(q, device), _rows(k, device)
        self.cu_seqlens_q, self.cu_seqlens_k = _cu_seqlens(q, device), _cu_seqlens(k, device)
        self.max_seqlen_q = max(length for _, length, _, _ in q)
        self.max_seqlen_k = max(length for _, length, _, _ in k)

    def take_q(self, x: Tensor) -> Tensor:
        return x[self.q_rows] if isinstance(self.q_rows, slice) else x.index_select(0, self.q_rows)

    def take_k(self, x: Tensor) -> Tensor:
        return x[self.k_rows] if isinstance(self.k_rows, slice) else x.index_select(0, self.k_rows)

    def put_q(self, x: Tensor, value: Tensor) -> None:
        x[self.q_rows] = value.to(x.dtype)  # an indexed assignment does not convert

    def add_q(self, x: Tensor, value: Tensor) -> None:
        x[self.q_rows] += value

    def put_k(self, x: Tensor, value: Tensor) -> None:
        x[self.k_rows] = value.to(x.dtype)

    def add_k(self, x: Tensor, value: Tensor) -> None:
        if isinstance(self.k_rows, slice):
            x[self.k_rows] += value
        else:  # under context parallelism rows repeat: two rectangles see the beginning of one prefix
            x.index_add_(0, self.k_rows, value.to(x.dtype))


def packed_pieces(call: Call, device: torch.device) -> Sequence[PackedPiece]:
    if ("packed", device) not in call.cache:
        call.cache["packed", device] = (PackedPiece(call, device),)
    return call.cache["packed", device]


# (start, length, step, count): `count` stretches of `length` rows, `step` apart.
_Stretches = list[tuple[int, int, int, int]]


def _rows(stretches: _Stretches, device: torch.device) -> slice | Tensor:
    """Contiguous rows become a slice, hence a view; others an int64 index."""
    end, contiguous = stretches[0][0], True
    for start, length, step, count in stretches:
        contiguous &= start == end and (count == 1 or step == length)
        end = start + count * length
    if contiguous:
        return slice(stretches[0][0], end)
    parts = [
        (start + step * torch.arange(count)[:, None] + torch.arange(length)).flatten()
        for start, length, step, count in stretches
    ]
    return torch.cat(parts).to(device)


def _cu_seqlens(stretches: _Stretches, device: torch.device) -> Tensor:
    lengths = torch.tensor([length for _, length, _, _ in stretches])
    counts = torch.tensor([count for _, _, _, count in stretches])
    ends = lengths.repeat_interleave(counts).cumsum(0)
    return torch.nn.functional.pad(ends, (1, 0)).to(device, torch.int32)
