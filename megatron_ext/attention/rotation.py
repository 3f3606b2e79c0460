"""Rotary positions, turned where attention reads queries and keys.

Megatron rotates before core attention: each layer makes cosines and sines anew, of queries and of keys, keeps both, and copies
queries and keys about five times. Here the two tables are made once for a stream, the model hands them on with the record, and
a rotation writes its result and keeps nothing: its gradient is rotated back by the same tables.

Shape legend: s rows of the stream, n heads, d head size, p rotated pairs of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["RotaryTables", "RotatedStream"]


@dataclass(frozen=True)
class RotaryTables:
    """
    Attributes:
        cos, sin: [s, 1, p], in the precision of queries and keys, as Megatron and transformers round them; times the attention
            factor of a model whose positions are stretched.
        interleaved: a pair is two neighbouring channels, not one from each half of those that are rotated.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @classmethod
    def of(cls, embedding: Tensor, dtype: torch.dtype, interleaved: bool = False, scaling: float = 1.0) -> RotaryTables:
        """embedding: fp32 [s, 1, 1, 2 p], the angle of every rotated channel, as Megatron's rotary modules give it."""
        angles = embedding[:, 0, :, ::2] if interleaved else embedding[:, 0, :, : embedding.size(-1) // 2]
        cos, sin = angles.cos(), angles.sin()
        if scaling != 1:
            cos, sin = cos * scaling, sin * scaling
        return cls(cos.to(dtype), sin.to(dtype), interleaved)

    def rotate(self, x: Tensor) -> Tensor:
        """[s, n, d] -> [s, n, d]; channels beyond the first 2 p stay as they are."""
        if not torch.is_grad_enabled():  # a decoding step is short enough for autograd's bookkeeping to count
            return _rotated(x, self.cos, self.sin, self.interleaved)
        return _Rotation.apply(x, self.cos, self.sin, self.interleaved)


class RotatedStream(PackedSeqParams):
    """A record of a stream whose queries and keys core attention has to rotate. Megatron only carries it there.

    Args:
        media_rows: int64, rows of the residual stream on this rank to which layers add what a vision tower saw; None: they add
            nothing.
    """

    def __init__(self, record: PackedSeqParams, tables: RotaryTables, media_rows: Tensor | None = None):
        super().__init__(qkv_format="sbhd")
        self.record, self.tables, self.media_rows = record, tables, media_rows


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin, ctx.interleaved), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = 2 * cos.size(-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # x may be a view of the whole projection
    if width < x.size(-1):
        out[..., width:] = x[..., width:]
    (a, b), (out_a, out_b) = (_pairs(t[..., :width], interleaved) for t in (x, out))
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    """Both channels of every pair, [..., p] each, as views."""
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
