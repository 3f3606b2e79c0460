"""The CUDA kernels against fp64 and against plain PyTorch, and layers that never make the host wait."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.attention import Scoring
from megatron_ext.attention.kernels import KERNELS
from tests.gpu.scenarios import AttentionCase, MergeCase, attention, layer_without_sync, merge
from tests.harness import cuda_devices, run_ranks
from tests.layouts import LAYOUTS, documents, plain_tree_attention, randn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda_devices() == 0, reason="needs a CUDA GPU")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LARGE = {
    "long prefix": ([(1021, [130, 7, 255]), (300, [64] * 8)], 16),
    "long responses": ([(17, [500, 301, 12])], 16),
    "tree": ([(65, [(130, [64, (33, [20, 260])]), 70, (21, [30, 30])]), (9, [4])], 16),
}
CASES = LAYOUTS | LARGE
PLAIN, WINDOW, SOFTCAP = Scoring(0.125), Scoring(0.125, window=50), Scoring(0.125, softcap=2.0)
# Every kernel that may be there, both forms, windows, and the second oracle.
VARIANTS = {
    "auto": (PLAIN, {}),
    "auto, one call": (PLAIN, {"attention_plan": "one_call"}),
    "auto, window": (WINDOW, {}),
    "flex": (PLAIN, {"attention_kernel": "flex"}),
    "flex, window": (WINDOW, {"attention_kernel": "flex"}),
    "flex, softcap": (SOFTCAP, {"attention_kernel": "flex"}),
    "blockwise, softcap": (SOFTCAP, {"attention_kernel": "blockwise"}),
} | {
    f"{name}{', ' + rule if rule else ''}": (scoring, {"attention_kernel": name})
    for name in ("torch_flash", "flash_attn_2", "flash_attn_3")
    for rule, scoring in (("", PLAIN), ("window", WINDOW), ("softcap", SOFTCAP))
    if rule != "softcap" or KERNELS[name].softcap
}


def make_case(rng, name: str, dtype: torch.dtype, scoring=PLAIN, how=None, n: int = 8, m: int = 2, d: int = 64):
    forest, pad = CASES[name]
    real = 1 + max(max(rows, default=-1) for rows, _ in documents(forest))
    t = real + -real % pad
    inputs = [randn(rng, t, h, d).to(dtype) for h in (n, m, m)]
    return AttentionCase(forest, pad, inputs, randn(rng, real, n, d).to(dtype), scoring, how or {})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_is_that_of_plain_attention(variant, dtype, rng):
    """L2 error against fp64: at most twice that of plain attention in the same precision, three times for gradients.

    A small layout's ratio is a matter of luck, so the bound is on all layouts together; each must be right to 5 %.
    """
    scoring, how = VARIANTS[variant]
    kernel = how.get("attention_kernel")
    if kernel in KERNELS and (lacking := KERNELS[kernel].missing()):
        pytest.skip(f"needs {lacking}")
    cases = {name: make_case(rng, name, dtype, scoring, how) for name in CASES}
    (results,) = run_ranks(attention, 1, list(cases.values()), cuda=True)
    totals = torch.zeros(2, 4, dtype=torch.float64)
    for (name, case), result in zip(cases.items(), results, strict=True):
        leaves = [x.double().requires_grad_() for x in case.inputs]
        rules = {"softcap": scoring.softcap, "window": scoring.window}
        out = plain_tree_attention(*leaves, case.forest, **rules)
        out.backward(case.grad.double())
        for i, truth in enumerate((out.detach(), *(x.grad for x in leaves))):
            errors = [(result[kind][i].double() - truth).norm() for kind in ("grouped", "plain")]
            assert result["grouped"][i].dtype == dtype
            assert errors[0] <= 0.05 * truth.norm() + 1e-6, (name, i)
            totals[:, i] += torch.stack(errors).square()
    ours, plain = totals.sqrt()
    assert bool((ours <= torch.tensor([2, 3, 3, 3]) * plain).all()), (ours, plain)


@pytest.mark.parametrize("how", [{}, {"attention_plan": "one_call"}], ids=["auto", "one call"])
@pytest.mark.parametrize("scoring", [PLAIN, WINDOW], ids=["plain", "window"])
@pytest.mark.parametrize("name", ["several groups, pad", "long prefix", "one response", "tree"])
def test_a_layer_never_makes_the_host_wait(name, scoring, how, rng):
    case = make_case(rng, name, torch.bfloat16, scoring, how)
    (results,) = run_ranks(layer_without_sync, 1, case, cuda=True)
    assert results == [True] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_merge_equals_torch(dtype, rng):
    cases = []
    for rows in (slice(5, 305), torch.randperm(400)[:300]):
        out, part = randn(rng, 400, 6, 80).to(dtype), randn(rng, 300, 6, 80).to(dtype)
        lse, part_lse = 8 * randn(rng, 400, 6).float(), 8 * randn(rng, 6, 300).float().t()
        cases.append(MergeCase(out, lse, part, part_lse, rows))
    (results,) = run_ranks(merge, 1, cases, cuda=True)
    for result in results:
        assert (result["lse"] - result["torch lse"]).abs().max() <= 1e-5
        bound = 1e-5 if dtype == torch.float32 else 2**-7
        assert ((result["out"].float() - result["torch out"]) / (1 + result["torch out"].abs())).abs().max() <= bound
