"""fp32 and bf16: the error against fp64 is at most a small multiple of what plain PyTorch has in the same precision.

The bounds are flash-attention's: twice the plain error for outputs, three times for gradients. Errors are L2 norms:
the largest single error is a matter of luck, and its ratio varies fourfold between seeds.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.attention import prefix_grouped_attention
from megatron_ext.grouping import PrefixGroups
from tests.layouts import plain_attention, randn

# Layouts with enough rows for the norms to be stable.
CASES = {
    "unequal": [(61, [17, 5, 33, 9]), (24, [3, 40])],
    "longer than a kernel block": [(301, [37, 150, 37]), (65, [129, 3])],
    "short prefix, many responses": [(5, [40] * 16)],
    "long prefix, many short responses": [(200, [3] * 32)],
}


def distance(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_error_is_that_of_plain_attention(attention_plan, name, dtype, rng):
    lengths = CASES[name]
    groups = PrefixGroups.from_lengths(lengths, pad_to_multiple=16)
    t, real, n, m, d = groups.num_tokens, groups.num_tokens - groups.num_pad_tokens, 8, 2, 16
    inputs = [randn(rng, t, heads, d).to(dtype) for heads in (n, m, m)]
    grad = randn(rng, real, n, d).to(dtype)

    def run(attend, precision: torch.dtype) -> list[Tensor]:
        leaves = [x.to(precision).detach().clone().requires_grad_() for x in inputs]
        out = attend(*leaves)[:real]
        out.backward(grad.to(precision))
        return [out.detach(), *(x.grad for x in leaves)]

    truth = run(lambda q, k, v: plain_attention(q, k, v, lengths), torch.float64)
    plain = run(lambda q, k, v: plain_attention(q, k, v, lengths), dtype)
    found = run(lambda q, k, v: prefix_grouped_attention(q, k, v, groups, attention_plan=attention_plan), dtype)
    for quantity, a, b, c in zip(("out", "dq", "dk", "dv"), found, plain, truth, strict=True):
        assert a.dtype == dtype
        bound = 2 if quantity == "out" else 3
        assert distance(a, c) <= bound * distance(b, c), (
            f"{quantity}: {distance(a, c):.3g} against {distance(b, c):.3g} of plain attention"
        )
