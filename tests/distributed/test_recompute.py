"""Recomputation under every kind of parallelism gives bitwise the gradients of keeping the activations."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.runtime.distributed import ParallelSizes
from tests.distributed.layout_scenarios import LayoutCase, gradients
from tests.gpt_cases import LATENT, make_rollout
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

LENGTHS = [(7, [3, 5]), (4, [6]), (5, [2, 2, 2]), (3, [9, 1])]
CUTS = [[0, 1], [2, 3]]
MODEL = {"num_layers": 4, "num_attention_heads": 16, "num_query_groups": 4, "context_parallel_size": 2}
EXPERTS = {
    "num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_aux_loss_coeff": 0.1, "moe_layer_freq": [0, 1, 1, 1],
    "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
LAYOUTS = {
    "cp2 tp2 sp": (
        ParallelSizes(tensor=2, context=2),
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "cp2 tp2 sp, latent": (
        ParallelSizes(tensor=2, context=2),
        LATENT | {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "cp2 tp2, all-to-all": (
        ParallelSizes(tensor=2, context=2),
        {"tensor_model_parallel_size": 2, "cp_comm_type": "a2a"},
    ),
    "cp2 pp2, windows": (
        ParallelSizes(pipeline=2, context=2),
        {
            "pipeline_model_parallel_size": 2,
            "window_size": [4, 0],
            "window_attn_skip_freq": 2,
            "softmax_type": "learnable",
        },  # fmt: skip
    ),
    "cp2 tp2 sp, experts": (
        ParallelSizes(tensor=2, context=2),
        EXPERTS | {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "cp2 pp2 ep2, experts": (
        ParallelSizes(pipeline=2, context=2, expert=2),
        EXPERTS | {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
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
        # But of experts that no token took.
        assert all(torch.count_nonzero(value) or ".local_experts." in n for n, value in none.items())
