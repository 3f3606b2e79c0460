"""The merge of `merge_partials`, and sinks that join, in one pass over memory, in place. Import it only where Triton is.

The torch form makes eight passes over fp32 intermediates; this one reads two results and writes one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["merge_rows", "sink_rows"]


@triton.jit
def _merge_kernel(
    out, lse, part, part_lse, rows, first_row,
    out_row, out_head, lse_row, lse_head, part_row, part_head, part_lse_row, part_lse_head,
    n, d, INDEXED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program merges all heads of one row; N and D are n and d rounded up to powers of two."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number) if INDEXED else first_row + number
    head, column = tl.arange(0, N), tl.arange(0, D)
    real = head < n
    wide = real[:, None] & (column < d)[None, :]
    lse_at = lse + row * lse_row + head * lse_head
    one = tl.load(lse_at, mask=real, other=0.0)
    two = tl.load(part_lse + number * part_lse_row + head * part_lse_head, mask=real, other=0.0)
    top = tl.where(one > two, one, two)
    weight, part_weight = tl.exp(one - top), tl.exp(two - top)
    total = weight + part_weight
    out_at = out + row * out_row + head[:, None] * out_head + column[None, :]
    part_at = part + number * part_row + head[:, None] * part_head + column[None, :]
    kept = tl.load(out_at, mask=wide, other=0.0).to(tl.float32)
    added = tl.load(part_at, mask=wide, other=0.0).to(tl.float32)
    merged = kept * (weight / total)[:, None] + added * (part_weight / total)[:, None]
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=wide)
    tl.store(lse_at, top + tl.log(total), mask=real)


def merge_rows(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor | slice) -> None:
    """Merge [r, n, d] and [r, n] into `rows` of out [t, n, d] and lse [t, n], in fp32.

    Args:
        out, part: fp32, bf16 or fp16, d contiguous.
        lse, part_lse: fp32, any strides.
        rows: int64 [r] without repeats, or a slice of r rows.
    """
    r, n, d = part.shape
    if not r:
        return
    indexed = not isinstance(rows, slice)
    _merge_kernel[(r,)](
        out, lse, part, part_lse, rows if indexed else lse, 0 if indexed else rows.start,
        out.stride(0), out.stride(1), *lse.stride(), part.stride(0), part.stride(1), *part_lse.stride(),
        n, d, INDEXED=indexed, N=triton.next_power_of_2(n), D=triton.next_power_of_2(d),
    )  # fmt: skip


@triton.jit
def _sink_kernel(
    out, lse, sinks, out_row, out_head, lse_row, lse_head, n, d, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program does all heads of one row; N and D are n and d rounded up to powers of two."""
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, N), tl.arange(0, D)
    real = head < n
    wide = real[:, None] & (column < d)[None, :]
    lse_at = lse + row * lse_row + head * lse_head
    one = tl.load(lse_at, mask=real, other=0.0)
    sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32)
    top = tl.where(one > sink, one, sink)
    weight = tl.exp(one - top)
    total = weight + tl.exp(sink - top)
    out_at = out + row * out_row + head[:, None] * out_head + column[None, :]
    kept = tl.load(out_at, mask=wide, other=0.0).to(tl.float32)
    tl.store(out_at, (kept * (weight / total)[:, None]).to(out.dtype.element_ty), mask=wide)
    tl.store(lse_at, top + tl.log(total), mask=real)


def sink_rows(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Let sinks [n] join out [t, n, d] and lse [t, n], in fp32.

    Args:
        out: fp32, bf16 or fp16, d contiguous.
        lse: fp32, any strides.
        sinks: contiguous.
    """
    t, n, d = out.shape
    if not t:
        return
    _sink_kernel[(t,)](
        out, lse, sinks, out.stride(0), out.stride(1), *lse.stride(), n, d,
        N=triton.next_power_of_2(n), D=triton.next_power_of_2(d),
    )  # fmt: skip
