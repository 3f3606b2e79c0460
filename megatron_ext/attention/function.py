"""Prefix-grouped attention: partial results merged by log-sum-exp, with the exact backward.

Forward (Prefix Grouper, arXiv 2506.05433; the merge is the usual one of flash attention's partial results):
each call gives (o_c, l_c); with l = logaddexp_c l_c, the output is o = sum_c exp(l_c - l) o_c.

Backward: a flash backward rebuilds P_ij = exp(scale q_i k_j - l_i) and D_i = sum_d dO_id O_id. Run with the MERGED o
and l, each call yields exactly its own scores' share of dq, dk and dv, and the shares add up. No gradient flows
through l, so nothing else is needed. Saved: q, k, v, o, l.

A plan of one call has nothing to merge; the keys it copies are copied again in backward rather than kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.attention.flex import flex_attention
from megatron_ext.attention.forms import choose_plan
from megatron_ext.attention.kernels import Kernel, Scoring, select_kernel
from megatron_ext.attention.merge import select_merge, wide_dtype
from megatron_ext.attention.plan import Plan
from megatron_ext.attention.reference import reference_attention
from megatron_ext.attention.sinks import add_sinks, sinks_gradient
from megatron_ext.devices import device_type
from megatron_ext.errors import UserError
from megatron_ext.grouping import PrefixGroups

__all__ = ["planned_attention", "planned_attention_backward", "prefix_grouped_attention", "run_plan"]


def prefix_grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: PrefixGroups,
    scoring: Scoring | None = None,
    attention_kernel: str = "auto",
    attention_plan: str = "auto",
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over a prefix-grouped stream, equal to causal attention over each [prefix, response] by itself.

    Args:
        query: [t, n, d], positions already applied.
        key, value: [t, m, d] with n a multiple of m (grouped-query attention; never repeated in memory). Values may be
            narrower, [t, m, e], as those of latent attention are.
        groups: the stream's record, `groups.num_tokens == t`.
        scoring: scale, soft cap and sliding window; defaults to the plain scale d ** -0.5.
        attention_kernel: "auto" (the first that can run here, logged once) or a name of `kernels.KERNELS`; "reference"
            (any device, fp64 over a dense [t, t] mask: for tests) or "flex" (FlexAttention, no backward on CPU).
        attention_plan: "auto" (by the measured rule of `forms`, logged once), "levels" or "one_call".
        sinks: [n], a logit for each head that joins every row's softmax (`sinks`); None: there are none.

    Returns:
        [t, n, e] in query's dtype. Rows of the tail pad hold values without meaning.

    Raises:
        UserError: shapes that do not fit each other or the record, or a kernel that cannot run here.
    """
    _check_shapes(query, key, value, groups, sinks)
    scoring = scoring or Scoring(query.size(-1) ** -0.5)
    if attention_kernel == "reference":
        return reference_attention(query, key, value, groups, scoring, sinks)
    if attention_kernel == "flex":
        return flex_attention(query, key, value, groups, scoring, sinks=sinks)
    kernel = select_kernel(attention_kernel, query.device, scoring)
    kind = device_type(query.device)
    plan = choose_plan(groups, scoring.window, query.size(1), key.size(1), kind, attention_plan)
    # In the form of levels the first call covers every key once, and a key is in one other call at most, that of the rows below.
    return run_plan(query, key, value, sinks, plan, kernel, scoring, every_key_once=True)


def run_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    plan: Plan,
    kernel: Kernel,
    scoring: Scoring,
    every_key_once: bool = False,
) -> Tensor:
    """query [tq, n, d], key [tk, m, d], value [tk, m, e] with e up to d, sinks [n] -> [tq, n, e], with all gradients.

    Args:
        every_key_once: as in `planned_attention_backward`.
    """
    width = value.size(-1)
    if kernel.takes_values(query.size(-1), width):
        return _PlannedAttention.apply(query, key, value, sinks, plan, kernel, scoring, every_key_once)
    padded = torch.nn.functional.pad(value, (0, query.size(-1) - width))  # with what adds nothing
    return _PlannedAttention.apply(query, key, padded, sinks, plan, kernel, scoring, every_key_once)[..., :width]


def planned_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, kernel: Kernel, scoring: Scoring, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run a plan, merge, and let sinks [n] join. query [tq, n, d], key [tk, m, d], value [tk, m, e] -> (out [tq, n, e], lse
    [tq, n]); no autograd. e is d unless the kernel takes other values."""
    wide = wide_dtype(query)
    shape = (*query.shape[:2], value.size(-1))
    out = torch.empty(shape, dtype=wide if len(plan.calls) > 2 else query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=wide, device=query.device)
    key, value = _copied(plan, key), _copied(plan, value)
    merge = select_merge(query.device)
    for number, call in enumerate(plan.calls):
        for piece in kernel.pieces(call, query.device):
            part, part_lse = kernel.forward(piece.take_q(query), piece.take_k(key), piece.take_k(value), piece, scoring)
            if number:
                merge(piece, out, lse, part, part_lse)
            else:
                piece.put_q(out, part)
                piece.put_q(lse, part_lse)
    add_sinks(out, lse, sinks)
    return out.to(query.dtype), lse


def _copied(plan: Plan, x: Tensor) -> Tensor:
    """Keys or values as the plan's calls count their rows."""
    return x if plan.copied is None else x.index_select(0, _copied_rows(plan, x.device))


def _copied_rows(plan: Plan, device: torch.device) -> Tensor:
    if device not in plan.cache:
        rows = [torch.arange(start, start + length) for start, length in plan.copied]
        plan.cache[device] = torch.cat(rows).to(device)
    return plan.cache[device]


def planned_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    kernel: Kernel,
    scoring: Scoring,
    every_key_once: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `planned_attention`, given its merged out and lse: dq [tq, n, d], dk and dv [tk, m, d].

    dq has query's dtype. dk and dv have key's where every key is in two calls at most, else fp32 (or fp64): one add of
    two low-precision numbers rounds once, as an fp32 sum of them would; more of them would round each time.

    Args:
        every_key_once: the first call covers every key, once.
    """
    wide = wide_dtype(query)
    dq = torch.empty(query.shape, dtype=wide if len(plan.calls) > 2 else query.dtype, device=query.device)
    keys, values = _copied(plan, key), _copied(plan, value)
    overwrite = every_key_once and plan.copied is None and not kernel.keys_overlap(plan.calls[0])
    if overwrite:
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (keys, values))
    else:
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (keys, values))
    for number, call in enumerate(plan.calls):
        for piece in kernel.pieces(call, query.device):
            part_q, part_k, part_v = kernel.backward(
                piece.take_q(grad), piece.take_q(query), piece.take_k(keys), piece.take_k(values),
                piece.take_q(out), piece.take_q(lse), piece, scoring,
            )  # fmt: skip
            (piece.add_q if number else piece.put_q)(dq, part_q)
            store = piece.put_k if overwrite and not number else piece.add_k
            store(dk, part_k)
            store(dv, part_v)
    if plan.copied is not None:
        rows = _copied_rows(plan, key.device)
        dk, dv = (
            torch.zeros(x.shape, dtype=wide, device=x.device).index_add_(0, rows, d)
            for x, d in ((key, dk), (value, dv))
        )
    return dq.to(query.dtype), dk, dv


class _PlannedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, plan, kernel, scoring, every_key_once):
        # A value sliced from a fused QKV projection would keep the whole projection alive until backward.
        value = value.contiguous()
        out, lse = planned_attention(query, key, value, plan, kernel, scoring, sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.plan, ctx.kernel, ctx.scoring, ctx.every_key_once = plan, kernel, scoring, every_key_once
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, sinks, out, lse = ctx.saved_tensors
        dq, dk, dv = planned_attention_backward(
            grad, query, key, value, out, lse, ctx.plan, ctx.kernel, ctx.scoring, ctx.every_key_once
        )
        dsinks = sinks_gradient(grad, out, lse, sinks)
        return dq, dk.to(key.dtype), dv.to(value.dtype), dsinks, None, None, None, None


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, groups: PrefixGroups, sinks: Tensor | None) -> None:
    if query.dim() != 3 or key.dim() != 3 or key.shape[:2] != value.shape[:2] or value.size(-1) > key.size(-1):
        raise UserError(
            f"expected query [t, n, d] and key, value [t, m, d or less], got {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}"
        )
    t, n, d = query.shape
    if t != groups.num_tokens or key.size(0) != t:
        raise UserError(f"the record has {groups.num_tokens} tokens, query {t} and key {key.size(0)}")
    if key.size(2) != d or n % key.size(1):
        raise UserError(f"{n} query heads of {d} do not fit {key.size(1)} key/value heads of {key.size(2)}")
    if sinks is not None and sinks.shape != (n,):
        raise UserError(f"{n} query heads have {n} sinks, got {tuple(sinks.shape)}")
