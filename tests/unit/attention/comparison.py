"""Attention compared with attention, and a plan with the pairs of rows that it computes.

The bound 1e-10 is far above fp64 rounding of these sums (about 1e-14) and far below any wrong term (about 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.attention.plan import Call, Plan
from megatron_ext.grouping import PrefixGroups
from tests.layouts import error, randn

__all__ = ["BOUND", "assert_close", "draw", "outputs_and_grads", "scores_of", "scores_of_plan"]

BOUND = 1e-10


def outputs_and_grads(attend, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv] for the rows that `grad` covers."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)[: grad.size(0)]
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert a.shape == b.shape
        assert error(a, b) <= BOUND, f"{name} differs by {error(a, b)}"


def draw(rng, groups: PrefixGroups, n: int, m: int, d: int = 16) -> tuple[list[Tensor], Tensor]:
    """([q, k, v], gradient of the rows before the pad)."""
    t = groups.num_tokens
    inputs = [randn(rng, t, heads, d) for heads in (n, m, m)]
    return inputs, randn(rng, t - groups.num_pad_tokens, n, d)


def scores_of(call: Call, queries: int, keys: int) -> Tensor:
    """int [queries, keys]: how often the call computes each pair."""
    count = torch.zeros(queries, keys, dtype=torch.long)
    for r in call.rectangles:
        block = torch.ones(r.q_len, r.k_len, dtype=torch.long)
        if call.causal:
            block = block.tril(r.k_len - r.q_len)
        if call.window is not None:
            block = block.triu(r.k_len - r.q_len - call.window)
        count[r.q_start : r.q_start + r.q_len, r.k_start : r.k_start + r.k_len] += block
    return count


def scores_of_plan(plan: Plan, queries: int, keys: int) -> Tensor:
    """The same for all calls, keys that were copied counted where they came from."""
    if plan.copied is None:
        return sum(scores_of(call, queries, keys) for call in plan.calls)
    source = torch.tensor([row for start, length in plan.copied for row in range(start, start + length)])
    count = torch.zeros(queries, keys, dtype=torch.long)
    return count.index_add_(1, source, sum(scores_of(call, queries, len(source)) for call in plan.calls))
