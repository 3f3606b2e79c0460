"""Prefix-grouped attention: partial results merged by log-sum-exp, with the exact backward.

Forward (Prefix Grouper, arXiv 2506.05433; the merge is the usual one of flash attention's partial results):
each call gives (o_c, l_c); with l = logaddexp_c l_c, the output is o = sum_c exp(l_c - l) o_c.

Backward: a flash backward rebuilds P_ij = exp(scale q_i k_j - l_i) and D_i = sum_d dO_id O_id. Run with the MERGED o
and l, each call yields exactly its own scores' share of dq, dk and dv, and the shares add up. No gradient flows
through l, so nothing else is needed. Saved: q, k, v, o, l.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.attention.kernels import Kernel, select_kernel
from megatron_ext.attention.plan import Call, plan_attention
from megatron_ext.attention.reference import reference_attention
from megatron_ext.grouping import PrefixGroups

__all__ = ["merge_partials", "planned_attention", "planned_attention_backward", "prefix_grouped_attention"]


def prefix_grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: PrefixGroups,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over a prefix-grouped stream, equal to causal attention over each [prefix, response] by itself.

    Args:
        query: [t, n, d], positions already applied.
        key, value: [t, m, d] with n a multiple of m (grouped-query attention; never repeated in memory).
        groups: the stream's record, `groups.num_tokens == t`.
        softmax_scale: defaults to d ** -0.5.
        backend: "auto" (by device, logged once), "cpu", "torch_flash" (CUDA, bf16/fp16), or "reference" (any
            device, fp64 over a dense [t, t] mask: for tests).

    Returns:
        [t, n, d] in query's dtype. Rows of the tail pad hold values without meaning.

    Raises:
        ValueError: shapes that do not fit each other or the record, or a backend that cannot run here.
    """
    _check_shapes(query, key, value, groups)
    scale = query.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    if backend == "reference":
        return reference_attention(query, key, value, groups, scale)
    kernel = select_kernel(backend, query.device)
    return _PlannedAttention.apply(query, key, value, plan_attention(groups), kernel, scale)


def planned_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: tuple[Call, ...], kernel: Kernel, scale: float
) -> tuple[Tensor, Tensor]:
    """Run a plan and merge. query [tq, n, d], key/value [tk, m, d] -> (out [tq, n, d], lse [tq, n]); no autograd."""
    wide = _wide(query)
    out = torch.empty(query.shape, dtype=wide if len(plan) > 2 else query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=wide, device=query.device)
    for number, call in enumerate(plan):
        for piece in kernel.pieces(call, query.device):
            part, part_lse = kernel.forward(piece.take_q(query), piece.take_k(key), piece.take_k(value), piece, scale)
            if number:
                part, part_lse = merge_partials(piece.take_q(out), piece.take_q(lse), part, part_lse)
            piece.put_q(out, part)
            piece.put_q(lse, part_lse)
    return out.to(query.dtype), lse


def _wide(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64. More than two results of lower precision are added in it: two are rounded once anyway."""
    return torch.promote_types(x.dtype, torch.float32)


def merge_partials(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial results in the lse's dtype (fp32 or fp64)."""
    merged = torch.logaddexp(lse, part_lse)
    weight, part_weight = (lse - merged).exp_(), (part_lse - merged).exp_()
    return out * weight.unsqueeze(-1) + part * part_weight.unsqueeze(-1), merged


def planned_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: tuple[Call, ...],
    kernel: Kernel,
    scale: float,
    dk: Tensor,
    dv: Tensor,
    add_keys: bool = False,
) -> Tensor:
    """Gradients of `planned_attention`, given its merged out and lse. Returns dq [tq, n, d]; fills dk and dv.

    Args:
        dk, dv: [tk, m, d]. The first call overwrites them, which is right where it covers every key; with `add_keys`
            every call adds to what is there.
    """
    # A query is in a call per level. One add of two low-precision numbers rounds once, as an fp32 sum of them would;
    # of more than two it would round each time.
    dq = torch.empty(query.shape, dtype=_wide(query) if len(plan) > 2 else query.dtype, device=query.device)
    for number, call in enumerate(plan):
        for piece in kernel.pieces(call, query.device):
            part_q, part_k, part_v = kernel.backward(
                piece.take_q(grad), piece.take_q(query), piece.take_k(key), piece.take_k(value),
                piece.take_q(out), piece.take_q(lse), piece, scale,
            )  # fmt: skip
            (piece.add_q if number else piece.put_q)(dq, part_q)
            store = piece.add_k if number or add_keys else piece.put_k
            store(dk, part_k)
            store(dv, part_v)
    return dq.to(query.dtype)


class _PlannedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan, kernel, scale):
        # A value sliced from a fused QKV projection would keep the whole projection alive until backward.
        value = value.contiguous()
        out, lse = planned_attention(query, key, value, plan, kernel, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.kernel, ctx.scale = plan, kernel, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        # The first call covers every key once, and a key is in one other call at most, that of the rows below.
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value))
        dq = planned_attention_backward(grad, query, key, value, out, lse, ctx.plan, ctx.kernel, ctx.scale, dk, dv)
        return dq, dk, dv, None, None, None


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, groups: PrefixGroups) -> None:
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape:
        raise ValueError(
            f"expected query [t, n, d] and key, value [t, m, d], got {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}"
        )
    t, n, d = query.shape
    if t != groups.num_tokens or key.size(0) != t:
        raise ValueError(f"the record has {groups.num_tokens} tokens, query {t} and key {key.size(0)}")
    if key.size(2) != d or n % key.size(1):
        raise ValueError(f"{n} query heads of {d} do not fit {key.size(1)} key/value heads of {key.size(2)}")
