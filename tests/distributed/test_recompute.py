"""Recomputation under every kind of parallelism gives bitwise the gradients of keeping the activations."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.runtime.distributed import ParallelSizes
from tests.distributed.scenarios import LayoutCase, gradients
from tests.gpt_cases import make_rollout
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

LENGTHS = [(7, [3, 5]), (4, [6]), (5, [2, 2, 2]), (3, [9, 1])]
CUTS = [[0, 1], [2, 3]]
MODEL = {"num_layers": 4, "num_attention_heads": 16, "num_query_groups": 4, "context_parallel_size": 2}
LAYOUTS = {
    "cp2 tp2 sp": (
        ParallelSizes(tensor=2, context=2),
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "cp2 tp2, all-to-all": (
        ParallelSizes(tensor=2, context=2),
        {"tensor_model_parallel_size": 2, "cp_comm_type": "a2a"},
    ),
    "cp2 pp2, windows": (
        ParallelSizes(pipeline=2, context=2),
        {"pipeline_model_parallel_size": 2, "window_size": [4, 0], "window_attn_skip_freq": 2},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_selective_and_full_recompute_equal_none_bitwise(name, rng):
    """Prefix trees in two microbatches, fp32; the last with layers' inputs on the host."""
    sizes, changes = LAYOUTS[name]
    rollout = make_rollout(rng, LENGTHS, 61, common=3)
    cases = [
        LayoutCase(
            MODEL | changes | {"activations_checkpoint_granularity": g, "activation_offload": o}, 5, rollout, CUTS, []
        )
        for g, o in ((None, False), ("selective", False), ("full", False), ("full", True))
    ]
    for none, *others in run_ranks(gradients, 4, cases, sizes=sizes):
        assert [int(r["passes"]) for r in (none, *others)] == [2, 4, 4, 4]  # it did recompute
        for other in others:
            assert other.keys() == none.keys()
            assert all(torch.equal(value, other[n]) for n, value in none.items() if n != "passes")
        assert all(torch.count_nonzero(value) for value in none.values())
