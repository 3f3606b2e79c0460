"""The CUDA kernels against fp64 and against plain PyTorch, and layers that never make the host wait."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.gpu.cases import (
    CASES,
    DTYPES,
    KINDS,
    PLAIN,
    WINDOW,
    errors,
    kernel_variants,
    lacking,
    make_case,
    merge_cases,
    truth,
)
from tests.gpu.scenarios import attention, layer_without_sync, merge
from tests.harness import cuda_devices, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda_devices() == 0, reason="needs a CUDA GPU")]

VARIANTS = kernel_variants("cuda")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_is_that_of_plain_attention(variant, dtype, rng):
    """L2 error against fp64: at most twice that of plain attention in the same precision, three times for gradients.

    A small layout's ratio is a matter of luck, so the bound is on all layouts together; each must be right to 5 %.
    """
    scoring, how = VARIANTS[variant]
    if needed := lacking(variant, "cuda"):
        pytest.skip(f"needs {needed}")
    cases = [make_case(rng, name, dtype, scoring, how) for name in CASES]
    (results,) = run_ranks(attention, 1, cases, cuda=True)
    found = errors(list(CASES), results, [truth(case) for case in cases], dtype)
    assert found.over_allowed <= 1, dataclasses.asdict(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sinks_and_values_of_another_size_are_as_exact(variant, kind, rng):
    scoring, how = VARIANTS[variant]
    if needed := lacking(variant, "cuda"):
        pytest.skip(f"needs {needed}")
    cases = [make_case(rng, name, torch.bfloat16, scoring, how, **KINDS[kind]) for name in CASES]
    (results,) = run_ranks(attention, 1, cases, cuda=True)
    found = errors(list(CASES), results, [truth(case) for case in cases], torch.bfloat16)
    assert found.over_allowed <= 1, dataclasses.asdict(found)


@pytest.mark.parametrize("how", [{}, {"attention_plan": "one_call"}], ids=["auto", "one call"])
@pytest.mark.parametrize("scoring", [PLAIN, WINDOW], ids=["plain", "window"])
@pytest.mark.parametrize("name", ["several groups, pad", "long prefix", "one response", "tree"])
def test_a_layer_never_makes_the_host_wait(name, scoring, how, rng):
    case = make_case(rng, name, torch.bfloat16, scoring, how)
    (results,) = run_ranks(layer_without_sync, 1, case, cuda=True)
    assert results == [True] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_merge_equals_torch(dtype, rng):
    (results,) = run_ranks(merge, 1, merge_cases(rng, dtype), cuda=True)
    for result in results:
        assert (result["lse"] - result["torch lse"]).abs().max() <= 1e-5
        bound = 1e-5 if dtype == torch.float32 else 2**-7
        assert ((result["out"].float() - result["torch out"]) / (1 + result["torch out"].abs())).abs().max() <= bound
