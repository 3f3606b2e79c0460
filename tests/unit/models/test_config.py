"""GPTModelConfig: what it derives, what it refuses, and that a foreign attention layer is not accepted."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_ext.models import build_gpt
from megatron_ext.models.config import PositionEmbedding, stream_multiple
from megatron_ext.models.megatron_config import megatron_config
from megatron_ext.models.specs import assert_all_attention_grouped, block_spec
from megatron_ext.rotary import RopeScaling
from tests.gpt_cases import LATENT, small_config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size=0.*at least 1"),
        ({"hidden_size": 33, "kv_channels": None}, "hidden_size=33 is not divisible.*set model.kv_channels"),
        ({"num_attention_heads": 8, "tensor_model_parallel_size": 3}, "num_attention_heads=8 is not divisible"),
        (
            {"num_attention_heads": 12, "num_query_groups": 6, "tensor_model_parallel_size": 4},
            "num_query_groups=6 is neither a multiple nor a divisor of model.tensor_model_parallel_size=4",
        ),
        (
            {"num_query_groups": 1, "kv_channels": 2, "tensor_model_parallel_size": 8},
            r"tensor_model_parallel_size=8 does not divide the 20 rows of queries, keys and values \(\(.*=8 \+ 2 x .*=1\) x",
        ),
        (
            {"tensor_model_parallel_size": 4, "context_parallel_size": 2, "cp_comm_type": "a2a"},
            "num_query_groups=2 does not divide by tensor_model_parallel_size x context_parallel_size=8",
        ),
        ({"ffn_hidden_size": 49, "tensor_model_parallel_size": 2}, "ffn_hidden_size=49"),
        ({"num_query_groups": 3}, "num_attention_heads=8 is not divisible by model.num_query_groups=3"),
        ({"pipeline_model_parallel_size": 4}, "num_layers=2 is not divisible by"),
        ({"sequence_parallel": True}, "sequence_parallel=true needs model.tensor_model_parallel_size > 1"),
        ({"precision": "fp8"}, "model.precision must be one of auto, 32, bf16, got 'fp8'"),
        (
            {"transformer_impl": "apex"},
            "model.transformer_impl must be one of auto, local, transformer_engine, got 'apex'",
        ),
        ({"cp_comm_type": "p2p"}, "model.cp_comm_type must be one of all_gather, a2a, got 'p2p'"),
        ({"activations_checkpoint_granularity": "block"}, "must be null, selective or full, got 'block'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
    ],
)
def test_refuses_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        small_config(**changes)


@pytest.mark.parametrize(
    ("tp", "heads", "shared"), [(1, (12, 2), False), (2, (6, 1), False), (4, (3, 1), True), (12, (1, 1), True)]
)
def test_ranks_beyond_the_key_value_heads_share_one(tp, heads, shared):
    """Qwen2.5-1.5B's heads."""
    config = small_config(num_attention_heads=12, num_query_groups=2, kv_channels=12, tensor_model_parallel_size=tp)
    assert (config.heads_per_rank, config.shares_key_value_heads) == (heads, shared)


def test_derived_fields():
    config = small_config(num_query_groups=None, kv_channels=None, precision=32)
    assert (config.num_query_groups, config.kv_channels, config.dtype) == (8, 4, torch.float32)
    assert small_config(precision="bf16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("vocab", "multiple", "tp", "padded"), [(61, 16, 1, 64), (61, 16, 2, 64), (64, 16, 2, 64), (65, 16, 2, 96)]
)
def test_vocabulary_is_padded_for_every_rank(vocab, multiple, tp, padded):
    config = small_config(vocab_size=vocab, make_vocab_size_divisible_by=multiple, tensor_model_parallel_size=tp)
    assert config.padded_vocab_size == padded


@pytest.mark.parametrize(("tp", "heads", "multiple"), [(1, 8, 16), (2, 8, 16), (3, 12, 48)])
def test_streams_divide_by_16_and_by_the_tensor_parallel_size(tp, heads, multiple):
    config = small_config(num_attention_heads=heads, num_query_groups=heads, tensor_model_parallel_size=tp)
    assert stream_multiple(config) == multiple


def test_precision_reaches_the_weights(world):
    dtypes = {p.dtype for p in build_gpt(small_config(precision="bf16"), world).parameters()}
    assert dtypes == {torch.bfloat16}


def test_refuses_a_model_without_vocabulary(world):
    with pytest.raises(ValueError, match="vocab_size is not set"):
        build_gpt(small_config(vocab_size=None), world)


def test_refuses_an_unknown_layer_implementation():
    with pytest.raises(ValueError, match="transformer_impl must be auto, local or transformer_engine, got 'apex'"):
        block_spec(1, False, "apex")


def test_refuses_a_model_with_an_ordinary_attention_layer(world):
    """It would attend across responses without a word; the message names the layer."""
    model = build_gpt(small_config(), world)
    assert_all_attention_grouped(model)
    attention = model.decoder.layers[1].self_attention
    attention.core_attention = DotProductAttention(model.config, 2, attention.attn_mask_type, "self")
    with pytest.raises(ValueError, match="layers.1.self_attention.core_attention is a DotProductAttention"):
        assert_all_attention_grouped(model)
    with pytest.raises(ValueError, match="no attention layer"):
        assert_all_attention_grouped(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window_size": [4]}, r"model.window_size=\[4\]: give \[rows before a query, 0\]"),
        ({"window_size": [-1, 0]}, r"model.window_size=\[-1, 0\]"),
        ({"window_size": [4, 1]}, r"model.window_size=\[4, 1\].*the second is 0"),
        ({"window_size": [4, 0], "window_attn_skip_freq": [1]}, "give one number for each of the 2 layers"),
        (
            {"window_size": [4, 0], "window_attn_skip_freq": 0},
            "model.window_attn_skip_freq=0 must be a number of at least 1",
        ),
        ({"window_size": [4, 0], "window_attn_skip_freq": [1, 2]}, r"=\[1, 2\] must be .* a list of 0 and 1"),
        ({"window_attn_skip_freq": 2}, "says which layers slide, but model.window_size is not set"),
        (
            {"attention_kernel": "cpu", "attn_logit_softcapping": 30.0},
            "model.attention_kernel=cpu: .*cannot cap scores",
        ),
        (
            {"attention_plan": "one_call", "context_parallel_size": 2},
            "model.attention_plan=one_call needs model.cp_comm_type=a2a",
        ),
        ({"attn_logit_softcapping": 0.0}, "model.attn_logit_softcapping=0.0 must be above 0"),
        ({"attention_kernel": "flash"}, "model.attention_kernel must be one of auto, cpu, blockwise"),
        ({"attention_plan": "tree"}, "model.attention_plan must be one of auto, levels, one_call"),
        ({"attention_plan": "levels", "window_size": [4, 0]}, "model.attention_plan=levels cannot run sliding windows"),
    ],
)
def test_refuses_attention_rules_without_meaning(changes, words):
    with pytest.raises(ValueError, match=words):
        small_config(**changes)


def stretched(rope_type: str, **keys) -> dict:
    return {"position_embedding": PositionEmbedding(scaling=RopeScaling(rope_type=rope_type, **keys))}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"softmax_type": "sinks"}, "model.softmax_type must be one of vanilla, learnable, off-by-one, got 'sinks'"),
        ({"no_rope_freq": [1]}, r"model.no_rope_freq=\[1\]: give a 0 or a 1 for each of the 2 layers"),
        ({"no_rope_freq": 0}, "model.no_rope_freq=0 must be at least 1"),
        ({"residual_multiplier": 0.0}, "model.residual_multiplier=0.0 must be above 0"),
        (
            stretched("dynamic", original_max_position_embeddings=100),
            "rope_type=dynamic turns sequences of more than 100 .* set model.encoder_seq_length=128 to at most 100",
        ),
        (
            stretched("longrope", short_factor=[1.0] * 3, long_factor=[2.0] * 4),
            "short_factor has 3 numbers for 4 rotated",
        ),
        (
            LATENT | {"kv_channels": 12},
            "model.kv_channels=12 must be 10 with model.multi_latent_attention=true, or null",
        ),
        (LATENT | {"num_query_groups": 2}, "model.num_query_groups=2 must be model.num_attention_heads=8, or null"),
        (LATENT | {"v_head_dim": 11}, "model.v_head_dim=11 must be at most 10"),
        (LATENT | {"qk_layernorm": True}, "model.qk_layernorm=true is not computed with"),
        (LATENT | {"context_parallel_size": 2, "cp_comm_type": "a2a"}, "cp_comm_type=a2a would send keys and values"),
        (LATENT | {"tensor_model_parallel_size": 8}, "model.q_lora_rank=20 is not divisible by"),
        (LATENT | {"kv_lora_rank": 0}, "model.kv_lora_rank=0 must be at least 1"),
        ({"q_lora_rank": 12}, "model.q_lora_rank=12 says nothing without model.multi_latent_attention=true"),
        ({"latent_layernorm_epsilon": 1e-6}, "model.latent_layernorm_epsilon=1e-06 says nothing without"),
        ({"kv_lora_rank": 16}, "model.kv_lora_rank=16 says nothing without"),
        ({"qk_head_dim": 8}, "model.qk_head_dim=8 says nothing without"),
        ({"qk_pos_emb_head_dim": 8}, "model.qk_pos_emb_head_dim=8 says nothing without"),
        ({"v_head_dim": 8}, "model.v_head_dim=8 says nothing without"),
        (LATENT | {"latent_layernorm_epsilon": 0.0}, "model.latent_layernorm_epsilon=0.0 must be above 0"),
        (LATENT | {"no_rope_freq": 2}, "model.no_rope_freq=2 is not computed with model.multi_latent_attention=true"),
    ],
)
def test_refuses_attention_that_is_not_computed(changes, words):
    with pytest.raises(ValueError, match=words):
        small_config(**changes)


def test_scores_and_layers_as_the_families_have_them():
    assert small_config(no_rope_freq=2).layers_without_rope == [0, 1]
    assert small_config().layers_without_rope is None and small_config(no_rope_freq=3).layers_without_rope is None
    latent = small_config(**LATENT)
    assert (latent.kv_channels, latent.cached_channels, latent.value_channels) == (10, 16, 8)
    assert latent.score_scale == pytest.approx(10**-0.5 * (0.07 * math.log(4.0) + 1) ** 2)
    assert small_config().score_scale is None and small_config(attention_multiplier=0.3).score_scale == 0.3


def test_layers_slide_as_megatron_has_it():
    assert small_config(window_size=[4, 0]).layer_windows == [4, 4]
    assert small_config(window_size=[4, 0], window_attn_skip_freq=2).layer_windows == [4, None]
    assert small_config(window_size=[4, 0], window_attn_skip_freq=[0, 1]).layer_windows == [None, 4]
    assert small_config().layer_windows == [None, None]


@pytest.mark.parametrize(
    ("device", "changes", "words"),
    [
        ("cpu", {"attention_kernel": "torch_flash"}, "model.attention_kernel=torch_flash: .*cannot run on cpu"),
        ("cpu", {"attention_kernel": "flash_attn_3"}, "model.attention_kernel=flash_attn_3: .*cannot run on cpu"),
        ("cuda", {"attention_kernel": "cpu"}, "model.attention_kernel=cpu: .*cannot run on cuda"),
        ("cuda", {"precision": "32"}, "model.precision=32: the fast attention kernels of a GPU take bf16 only"),
        ("cuda", {"kv_channels": 4}, "model.kv_channels=4: .*multiples of 8 up to 256"),
        ("cuda", {"kv_channels": 264}, "model.kv_channels=264: .*multiples of 8 up to 256"),
        ("cpu", {"gradient_accumulation_fusion": True}, "gradient_accumulation_fusion=true .* cannot run on cpu"),
    ],
)
def test_what_a_device_does_not_run_is_refused_for_it_alone(device, changes, words):
    """Whatever machine the configuration is read on, such as a login node."""
    config = small_config(**{"kv_channels": 8, "precision": "auto"} | changes)
    config.on({"cpu": "cuda", "cuda": "cpu"}[device])
    with pytest.raises(ValueError, match=words):
        config.on(device)


def test_auto_stays_until_the_device_is_known():
    config = small_config(kv_channels=8, precision="auto")
    assert config.precision == "auto"
    with pytest.raises(AssertionError, match="has not been resolved"):
        config.dtype  # noqa: B018
    for device, precision, dtype in (("cpu", "32", torch.float32), ("cuda", "bf16", torch.bfloat16)):
        found = config.on(device)
        assert found == dataclasses.replace(config, precision=precision) == found.on(device)
        assert found.dtype == dtype and type(found) is type(config)
    assert config.precision == "auto"
    assert megatron_config(config.on("cuda"), "cuda").bf16 and not megatron_config(config.on("cpu"), "cpu").bf16
    blockwise = small_config(kv_channels=4, precision="32", attention_kernel="blockwise")
    assert blockwise.on("cuda") == blockwise.on("cpu") == blockwise


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_ranks_run_on_what_is_here(world):
    config = small_config(precision="auto")
    assert config.here() == config.on("cpu")
    assert build_gpt(config, world).model_config == config.on("cpu")
    with pytest.raises(ValueError, match="cannot run on cpu"):
        small_config(attention_kernel="flash_attn_2").here()
