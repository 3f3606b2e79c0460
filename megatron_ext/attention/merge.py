"""Merging partial results by log-sum-exp: with l = ln(exp(l1) + exp(l2)), o = exp(l1 - l) o1 + exp(l2 - l) o2.

One rule, two ways: torch operations, and on a GPU one Triton kernel that reads and writes every number once.

Shape legend: t rows of the output, r rows of the part, n heads, d head dimension.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from megatron_ext.attention.pieces import PackedPiece
from megatron_ext.devices import device_type

__all__ = ["merge_partials", "select_merge", "wide_dtype"]

logger = logging.getLogger(__name__)


def wide_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64: what sums are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def merge_partials(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial results, [..., d] and [...], in the lse's dtype (fp32 or fp64)."""
    merged = torch.logaddexp(lse, part_lse)
    weight, part_weight = (lse - merged).exp_(), (part_lse - merged).exp_()
    return out * weight.unsqueeze(-1) + part * part_weight.unsqueeze(-1), merged


def _merge_with_torch(piece, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a piece's result into its query rows of out [t, n, d] and lse [t, n]."""
    merged, merged_lse = merge_partials(piece.take_q(out), piece.take_q(lse), part, part_lse)
    piece.put_q(out, merged)
    piece.put_q(lse, merged_lse)


def _merge_with_triton(piece, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    if not isinstance(piece, PackedPiece):  # of the blockwise kernel, which is slow anyway
        _merge_with_torch(piece, out, lse, part, part_lse)
        return
    from megatron_ext.attention.merge_triton import merge_rows

    merge_rows(out, lse, part, part_lse, piece.q_rows)


@cache
def select_merge(device: torch.device) -> Callable[..., None]:
    """The way that fits the device; logged once."""
    if device_type(device) == "cuda":
        fused = importlib.util.find_spec("triton") is not None
        logger.info("partial results of attention are merged by %s", "a Triton kernel" if fused else "torch")
        return _merge_with_triton if fused else _merge_with_torch
    return _merge_with_torch
