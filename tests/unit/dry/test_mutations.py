"""A fault planted in a kernel, the merge, the loss, the sampler or the engine makes the dry run fail, and it is told which."""

from __future__ import annotations

import pytest

from tests.dry.mutations import MUTATIONS, mutations
from tests.harness import run_ranks

# What is said of each planted fault, by what it is.
WORDS = {
    "read": "the host reads a value ()", "tensor of the host": "a tensor of the host", "keys of the host": "a tensor of the host",
    "mask": "waits for the device", "int64 lengths": "cu_seqlens torch.int64", "strided lse": "softmax_lse torch.float32",
    "fp64": "gives fp64 on the device", "fp64 lse": "gives fp64 on the device", "fp32 query": "q torch.float32",
    "bf16 lse": "of the part torch.bfloat16",
    "one read more": "'copy'): 2", "one read less": "reads {",
}  # fmt: skip


@pytest.fixture(scope="module")
def planted() -> dict[str, str | None]:
    (found,) = run_ranks(mutations, 1)
    return found


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_fault_is_found(name, planted):
    assert WORDS[name.partition(", ")[2]] in planted[name]
