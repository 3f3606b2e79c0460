"""Whole steps as a GPU would take them: nothing but the listed reads makes the host wait, and what is planted is found."""

from __future__ import annotations

import pytest

from tests.dry.mutations import MUTATIONS, mutations
from tests.dry.steps import STEPS, steps
from tests.harness import run_ranks


@pytest.fixture(scope="module")
def taken() -> dict[str, dict]:
    (found,) = run_ranks(steps, 1, list(STEPS))
    return dict(zip(STEPS, found, strict=True))


@pytest.fixture(scope="module")
def planted() -> dict[str, str | None]:
    (found,) = run_ranks(mutations, 1)
    return found


@pytest.mark.parametrize("name", STEPS)
def test_the_host_reads_what_it_must_and_no_more(name, taken):
    assert taken[name]["reads"] == STEPS[name].reads


# What is said of each planted fault, by what it is.
WORDS = {
    "read": "the host reads a value ()", "tensor of the host": "a tensor of the host", "keys of the host": "a tensor of the host",
    "mask": "waits for the device", "int64 lengths": "cu_seqlens torch.int64", "strided lse": "softmax_lse torch.float32",
    "fp64": "gives fp64 on the device", "fp64 lse": "gives fp64 on the device", "fp32 query": "q torch.float32",
    "bf16 lse": "of the part torch.bfloat16", "int32 tokens": "torch.int32 (6,), not torch.int64",
    "one read more": "'copy'): 2", "one read less": "reads {",
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_fault_is_found(name, planted):
    assert WORDS[name.partition(", ")[2]] in planted[name]
