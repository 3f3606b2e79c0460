"""A variable-length attention kernel for the CPU: the contract of a GPU's kernels, kept by plain PyTorch.

What surrounds those kernels (packed rows, cu_seqlens, log-sum-exp as [n, rows], windows aligned at the lower right) is
thereby tried where there is no GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.attention.pieces import PackedPiece, packed_pieces

__all__ = ["VarlenKernel"]


class VarlenKernel:
    name, softcap, device = "varlen", False, None

    def missing(self):
        return None

    def takes_values(self, key, value):
        return value == key

    def pieces(self, call, device):
        return packed_pieces(call, device)

    def keys_overlap(self, call):
        return False

    def forward(self, q, k, v, piece: PackedPiece, scoring):
        out, lse = torch.empty_like(q), q.new_empty(q.size(1), q.size(0), dtype=_wide(q))
        for queries, keys in _documents(piece):
            scores = self._scores(q[queries], k[keys], piece, scoring)
            lse[:, queries] = scores.logsumexp(-1)
            out[queries] = (scores.softmax(-1) @ _heads(v[keys], q)).transpose(0, 1).to(q.dtype)
        return out, lse.transpose(0, 1)

    def backward(self, grad, q, k, v, out, lse, piece: PackedPiece, scoring):
        assert lse.dtype == _wide(q) and out.dtype in (q.dtype, _wide(q))
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        for queries, keys in _documents(piece):
            weights = (self._scores(q[queries], k[keys], piece, scoring) - lse[queries].t().unsqueeze(-1)).exp()
            g, o = (x[queries].to(_wide(q)).transpose(0, 1) for x in (grad, out))
            ds = weights * (g @ _heads(v[keys], q).transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * scoring.scale
            dq[queries] = (ds @ _heads(k[keys], q)).transpose(0, 1).to(q.dtype)
            for x, share in ((dk, ds.transpose(1, 2) @ _heads(q[queries], q)), (dv, weights.transpose(1, 2) @ g)):
                x[keys] = share.unflatten(0, (k.size(1), -1)).sum(1).transpose(0, 1).to(k.dtype)
        return dq, dk, dv

    def _scores(self, q: Tensor, k: Tensor, piece: PackedPiece, scoring) -> Tensor:
        scores = _heads(q, q) @ _heads(k, q).transpose(1, 2) * scoring.scale
        own = torch.arange(len(k) - len(q), len(k))[:, None]
        key = torch.arange(len(k))
        hidden = (key > own) if piece.causal else torch.zeros(len(q), len(k), dtype=torch.bool)
        if piece.window is not None:
            hidden |= key < own - piece.window
        return scores.masked_fill(hidden, float("-inf"))


def _documents(piece: PackedPiece):
    q, k = piece.cu_seqlens_q.tolist(), piece.cu_seqlens_k.tolist()
    assert max(b - a for a, b in zip(q, q[1:], strict=False)) == piece.max_seqlen_q
    assert max(b - a for a, b in zip(k, k[1:], strict=False)) == piece.max_seqlen_k
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _heads(x: Tensor, query: Tensor) -> Tensor:
    """[s, n or m, d] -> [n, s, d], wide."""
    return x.to(_wide(x)).repeat_interleave(query.size(1) // x.size(1), 1).transpose(0, 1)
