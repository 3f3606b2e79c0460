"""Linears in 8 bits: what is refused, how streams are padded, what Megatron is told.

Whether they are asked for as Transformer Engine takes it is in test_transformer_engine.py.
"""

from __future__ import annotations

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.fp8 import FP8_ROWS, check_fp8
from megatron_ext.models.megatron_config import megatron_config
from megatron_ext.planner import estimate
from megatron_ext.planner.activations import FUSED, FUSED_FP8, StreamShape, on_gpu, stage_activations
from tests.dry.machine import pretended_gpu
from tests.gpt_cases import small_config
from tests.unit.planner.cases import job


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fp8": "e5m2"}, "model.fp8 must be one of null, e4m3, hybrid, got 'e5m2'"),
        ({"fp8_recipe": "delayed"}, "fp8_recipe=delayed takes scales from earlier passes"),
        ({"fp8_recipe": "blocks"}, "fp8_recipe must be one of tensorwise, blockwise, mxfp8, got 'blocks'"),
        ({"precision": "32"}, "model.fp8=hybrid needs model.precision=bf16, got 32"),
        ({"transformer_impl": "local"}, "model.transformer_impl=local does without; set it to auto"),
        ({"hidden_size": 40}, "model.hidden_size: 40 is no multiple of 16"),
        ({"ffn_hidden_size": 40, "tensor_model_parallel_size": 2}, "ffn_hidden_size per tensor-parallel rank: 20 is"),
        ({"fp8_recipe": "mxfp8"}, "ffn_hidden_size per tensor-parallel rank: 48 is no multiple of 32"),
        ({"num_query_groups": 1}, "queries, keys and values per tensor-parallel rank: 80 is no multiple of 32"),
        ({"kv_channels": 6}, "queries, keys and values per tensor-parallel rank: 72 is no multiple of 16"),
    ],
)
def test_what_fp8_cannot_be_is_refused(changes, said):
    if "num_query_groups" in changes:
        changes |= {"fp8_recipe": "mxfp8", "ffn_hidden_size": 64}
    with pytest.raises(UserError, match=said):
        small_config(**({"fp8": "hybrid"} | changes))


def test_it_needs_a_gpu_that_has_it_and_transformer_engine():
    with pytest.raises(UserError, match="model.fp8=e4m3 cannot run on cpu"):
        small_config(fp8="e4m3").on("cpu")
    assert small_config(fp8="e4m3").on("cuda").fp8 == "e4m3"
    with pretended_gpu():  # a Hopper
        with pytest.raises(UserError, match=r"mxfp8 needs a GPU of compute capability 10.0 \(Blackwell\) .* has 9.0"):
            check_fp8("mxfp8")
        for recipe in ("tensorwise", "blockwise"):
            with pytest.raises(UserError, match="model.fp8 needs Transformer Engine, which is not installed here"):
                check_fp8(recipe)


@pytest.mark.parametrize(("recipe", "rows"), FP8_ROWS.items())
def test_every_ranks_rows_are_a_multiple(recipe, rows):
    fields = {"fp8": "hybrid", "fp8_recipe": recipe, "hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 16}
    for tp, sequence in ((1, False), (2, False), (2, True)):
        config = small_config(tensor_model_parallel_size=tp, sequence_parallel=sequence, **fields)
        multiple = stream_multiple(config)
        assert multiple == rows * (tp if sequence else 1)
        assert multiple % stream_multiple(small_config(tensor_model_parallel_size=tp)) == 0


def test_megatron_keeps_no_weights_of_an_earlier_pass():
    plain, found = (megatron_config(small_config(fp8=fp8).on("cuda"), "cuda") for fp8 in (None, "e4m3"))
    assert (found.fp8, found.fp8_recipe, found.disable_parameter_transpose_cache) == ("e4m3", "tensorwise", True)
    assert plain.fp8 is None and not (
        found.fp8_param or found.fp8_dot_product_attention or found.fp8_multi_head_attention
    )


def test_planned_bytes_are_a_byte_less_of_three_inputs_and_two_copies_of_the_weights_more():
    """Of a layer: the inputs of the first, third and fourth linear. Attention's output, the second's, is kept in bf16."""
    config = small_config(precision="bf16", transformer_impl="transformer_engine")
    plain, found = (stage_activations(config, 0, StreamShape(1024, 300), how) for how in (FUSED, FUSED_FP8))
    weights = 32 * (96 + 64 + 3 * 48)
    assert plain.layer - found.layer == 1024 * (2 * 32 + 48) - 2 * weights
    assert (plain.input, plain.output) == (found.input, found.output)
    assert on_gpu("auto", fp8=True) == on_gpu("transformer_engine", fp8=True) == FUSED_FP8
    start = job()
    before, after = estimate(start), estimate(start.laid_out(fp8="hybrid"))
    for kind in ("parameters", "gradients", "optimizer", "copies", "cache", "host"):
        assert getattr(after.fullest, kind) == getattr(before.fullest, kind)
    assert after.step.training < before.step.training < 1.5 * after.step.training
    assert start.laid_out(fp8="hybrid").model.dtype == torch.bfloat16
