"""The CUDA kernel against fp64 and against plain PyTorch, and layers that never make the host wait."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.scenarios import AttentionCase, attention, layer_without_sync
from tests.harness import cuda_devices, run_ranks
from tests.layouts import LAYOUTS, Lengths, plain_attention, randn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda_devices() == 0, reason="needs a CUDA GPU")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LARGE: dict[str, tuple[Lengths, int]] = {
    "long prefix": ([(1021, [130, 7, 255]), (300, [64] * 8)], 16),
    "long responses": ([(17, [500, 301, 12])], 16),
}
CASES = LAYOUTS | LARGE


def make_case(rng, name: str, dtype: torch.dtype, n: int = 8, m: int = 2, d: int = 64) -> AttentionCase:
    lengths, pad = CASES[name]
    real = sum(p + sum(s) for p, s in lengths)
    t = real + -real % pad
    return AttentionCase(
        lengths, pad, [randn(rng, t, h, d).to(dtype) for h in (n, m, m)], randn(rng, real, n, d).to(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_error_is_that_of_plain_attention(dtype, rng):
    """L2 error against fp64: at most twice that of plain attention in the same precision, three times for gradients.

    A small layout's ratio is a matter of luck, so the bound is on all layouts together; each must be right to 5 %.
    """
    cases = {name: make_case(rng, name, dtype) for name in CASES}
    (results,) = run_ranks(attention, 1, list(cases.values()), cuda=True)
    totals = torch.zeros(2, 4, dtype=torch.float64)
    for (name, case), result in zip(cases.items(), results, strict=True):
        leaves = [x.double().requires_grad_() for x in case.inputs]
        out = plain_attention(*leaves, case.lengths)
        out.backward(case.grad.double())
        for i, truth in enumerate((out.detach(), *(x.grad for x in leaves))):
            errors = [(result[kind][i].double() - truth).norm() for kind in ("grouped", "plain")]
            assert result["grouped"][i].dtype == dtype
            assert errors[0] <= 0.05 * truth.norm() + 1e-6, (name, i)
            totals[:, i] += torch.stack(errors).square()
    ours, plain = totals.sqrt()
    assert bool((ours <= torch.tensor([2, 3, 3, 3]) * plain).all()), (ours, plain)


@pytest.mark.parametrize("name", ["several groups, pad", "long prefix", "one response"])
def test_a_layer_never_makes_the_host_wait(name, rng):
    case = make_case(rng, name, torch.bfloat16)
    (results,) = run_ranks(layer_without_sync, 1, case, cuda=True)
    assert results == [True] * 5
