"""What a kernel that adds weights' gradients to the buffer saves, and what stands in their place: counted by hand."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ext.planner import estimate
from tests.unit.planner.cases import job

FUSED = {"gradient_accumulation_fusion": True}
# Rows of the projections of queries, keys and values, of attention's output, of the MLP's first linear, channels of its second.
ROWS = 3072 + 2048 + 32768 + 16384
MLP = 2 * 32768 * 2048  # bytes of one gradient in bf16


def stages(model: dict, **changes) -> list:
    return estimate(job({"ffn_hidden_size": 16384} | model, rollout=False, **changes)).stages


@pytest.mark.parametrize("tensor", [1, 2])
def test_one_tensor_for_each_shape_stands_where_a_gradient_was(tensor):
    """Whatever the number of layers; the MLP's own gradient is gone while its backward pass runs."""
    # Few rows and a small vocabulary: nothing else holds as much.
    model = {"tensor_model_parallel_size": tensor, "transformer_impl": "transformer_engine", "vocab_size": 1024}
    few = {"groups": 8, "prompt": 64, "response": 16, "samples": 1}
    for layers in (16, 8):
        (plain,) = stages(model | {"num_layers": layers}, **few)
        (found,) = stages(model | {"num_layers": layers} | FUSED, **few)
        assert found.gradients - plain.gradients == 2 * 2048 * ROWS // tensor
        assert plain.working - found.working == MLP // tensor
        same = dataclasses.replace(found, gradients=plain.gradients, working=plain.working)
        assert same == plain


def test_a_pipelines_stages_have_one_each():
    first, last = stages({"pipeline_model_parallel_size": 2} | FUSED)
    of_first, of_last = stages({"pipeline_model_parallel_size": 2})
    assert first.gradients - of_first.gradients == last.gradients - of_last.gradients == 2 * 2048 * ROWS


def test_linears_without_transformer_engine_save_nothing():
    """Megatron hands autograd an empty tensor of each gradient's size."""
    assert stages({"transformer_impl": "local"} | FUSED) == stages({"transformer_impl": "local"})
