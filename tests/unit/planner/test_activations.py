"""Bytes that autograd keeps for media, and for what a GPU's operations keep less of. Text: tests/distributed/test_planner.py."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from megatron_ext.adapters import LoraConfig
from megatron_ext.models import build_gpt
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.models.media import MediaPrompt, pack_prompts
from megatron_ext.planner.activations import EAGER, FUSED, Implementation, StreamShape, on_gpu, stage_activations
from megatron_ext.rotary import Text, Video
from megatron_ext.vision import VisionConfig
from megatron_ext.vision.kinds import read_tower_config
from tests.gpt_cases import LATENT, make_rollout, pack_rollout, small_config
from tests.held_bytes import saved_bytes
from tests.layouts import randn
from tests.vision_cases import IMAGE, TOWERS, image_prompt, patches, pictures, qwen_prompt, qwen_tower

OF_GPT_OSS = {
    "add_bias_linear": True, "activation": "quick_gelu", "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0,
    "moe_ffn_hidden_size": 96,
}  # fmt: skip


@pytest.mark.parametrize("share", [True, False])
def test_media_are_counted(share, rng, world):
    """Within 10 %: indices of rows are counted, the mask of none is not."""
    draw = random.Random()
    features, video = draw.randint(8, 200), Video(draw.randint(2, 5), 3, 4)
    config = small_config(
        vision=VisionConfig(features), position_embedding=PositionEmbedding("vrope"), hidden_size=draw.choice([32, 64])
    ).on("cpu")
    items = [Text(3), video, Text(2)]
    tokens = [1] * 3 + [60] * video.length + [2] * 2
    prompts = [MediaPrompt.of(tokens, 60, [items[1]], randn(rng, video.length, features)) for _ in range(2)]
    batch = pack_prompts(prompts, [[[5] * 4, [6] * 7], [[7] * 3]], "vrope", 16, world, share_prefix=share)
    model = build_gpt(config, world)
    stream = StreamShape(
        batch.groups.num_tokens,
        batch.groups.num_predicted_tokens,
        media_rows=len(batch.media.rows),
        media_tokens=len(batch.media.content),
    )
    planned = stage_activations(config, 0, stream, EAGER)
    assert planned.input > 2 * video.length * features * 4
    assert planned.kept == pytest.approx(saved_bytes(model, batch), rel=0.1)


@pytest.mark.parametrize("kind", [*sorted(TOWERS), "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("granularity", [None, "full"])
def test_a_tower_that_trains_is_an_upper_bound(kind, granularity, rng, world):
    """And less than twice as much."""
    tower = TOWERS[kind] if kind in TOWERS else qwen_tower(kind)
    eyes = VisionConfig(tower_config=read_tower_config(tower, "here"), vision_feature_layer=-1)
    config = small_config(
        vision=eyes, freeze_vision_model=False, vocab_size=IMAGE + 1, activations_checkpoint_granularity=granularity
    ).on("cpu")
    if kind in TOWERS:
        prompt = image_prompt(rng, [1, pictures(rng, 6), 1])
    else:
        prompt = qwen_prompt(rng, [1, patches(rng, 1, 8, 12), 1])
    batch = pack_prompts([prompt], [[[5] * 4]], "rope", 16, world)
    stream = StreamShape(batch.groups.num_tokens, batch.groups.num_predicted_tokens, len(batch.media.rows), 6 * 4)
    planned, saved = stage_activations(config, 0, stream, EAGER).kept, saved_bytes(build_gpt(config, world), batch)
    assert saved * 0.95 < planned < saved * 2


def test_layers_of_a_gpu_are_fused_but_for_norms_of_an_old_torch():
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert on_gpu("auto") == on_gpu("transformer_engine") == FUSED
    assert on_gpu("local") == Implementation(fused_norm=version >= (2, 9), fused_swiglu=True)


def test_a_plain_norm_keeps_six_bytes_more_of_every_number():
    """In bf16: input and normalised input in fp32, instead of the input. Two norms in each of four layers, and the last."""
    stream = StreamShape(1024, 300)
    config = small_config(precision="bf16", num_layers=4, qk_layernorm=False)
    plain, fused = (
        stage_activations(config, 0, stream, Implementation(norm, fused_swiglu=True)).kept for norm in (False, True)
    )
    assert plain - fused == (2 * 4 + 1) * 1024 * 32 * 6


@pytest.mark.parametrize(
    ("targets", "changes"),
    [
        (["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], {}),
        (["q_proj", "v_proj"], {}),
        (["linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"], LATENT),
    ],
    ids=["all", "some", "latent"],
)
@pytest.mark.parametrize("granularity", [None, "selective", "full"])
def test_adapters_keep_little_more_than_is_planned(granularity, targets, changes, rng, world):
    """An upper bound: frozen linears keep no input, where there is no adapter that reads it."""
    config = small_config(
        peft=LoraConfig(dim=4, target_modules=targets),
        activations_checkpoint_granularity=granularity,
        num_layers=4,
        **changes,
    ).on("cpu")
    batch = pack_rollout(make_rollout(rng, [(40, [12, 17, 7])], 61))
    stream = StreamShape(batch.groups.num_tokens, batch.groups.num_predicted_tokens)
    planned = stage_activations(config, 0, stream, EAGER)
    plain = stage_activations(dataclasses.replace(config, peft=None), 0, stream, EAGER)
    assert planned.kept >= plain.kept and (planned.kept > plain.kept) == (granularity != "full")
    saved = saved_bytes(build_gpt(config, world), batch)
    assert 0.6 * planned.kept <= saved <= planned.kept


@pytest.mark.parametrize(
    ("granularity", "changes"),
    [
        (None, {"moe_router_topk": 1, "precision": "bf16"}),
        ("selective", {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True}),
        ("full", {"moe_layer_freq": 2}),
        (None, OF_GPT_OSS),
        (None, OF_GPT_OSS | {"precision": "bf16", "moe_router_topk": 4}),
        (
            None,
            OF_GPT_OSS
            | {"add_bias_linear": False, "moe_ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": 128},
        ),
    ],
)
def test_experts_keep_little_less_than_is_planned(granularity, changes, rng, world):
    """An upper bound, by hand."""
    config = small_config(
        num_moe_experts=8,
        num_layers=4,
        activations_checkpoint_granularity=granularity,
        **{"moe_ffn_hidden_size": 24} | changes,
    ).on("cpu")
    batch = pack_rollout(make_rollout(rng, [(60, [12, 17, 7])], 61))
    planned = stage_activations(
        config, 0, StreamShape(batch.groups.num_tokens, batch.groups.num_predicted_tokens), EAGER
    )
    saved = saved_bytes(build_gpt(config, world), batch)
    assert 0.7 * planned.kept <= saved <= planned.kept


@pytest.mark.parametrize(
    ("granularity", "changes"),
    [
        (None, {"moe_shared_expert_intermediate_size": 32}),
        ("selective", {"moe_shared_expert_intermediate_size": 32}),
        (None, OF_GPT_OSS),
    ],
)
def test_adapters_of_experts_keep_little_less_than_is_planned(granularity, changes, rng, world):
    """Of every expert, and of the shared one."""
    config = small_config(
        num_moe_experts=8,
        activations_checkpoint_granularity=granularity,
        **{"moe_ffn_hidden_size": 24} | changes,
        peft=LoraConfig(dim=16),
        num_layers=4,
    ).on("cpu")
    batch = pack_rollout(make_rollout(rng, [(60, [12, 17, 7])], 61))
    stream = StreamShape(batch.groups.num_tokens, batch.groups.num_predicted_tokens)
    planned = stage_activations(config, 0, stream, EAGER).kept
    elsewhere = dataclasses.replace(config, peft=LoraConfig(dim=16, target_modules=["linear_qkv", "linear_proj"]))
    assert planned > stage_activations(elsewhere, 0, stream, EAGER).kept
    saved = saved_bytes(build_gpt(config, world), batch)
    assert 0.6 * planned <= saved <= planned


@pytest.mark.parametrize("granularity", [None, "selective", "full"])
def test_a_gpu_keeps_no_more_and_full_recomputation_least(granularity):
    stream = StreamShape(1024, 300)
    config = small_config(precision="bf16", num_layers=4, activations_checkpoint_granularity=granularity)
    fused, eager = (stage_activations(config, 0, stream, how) for how in (FUSED, EAGER))
    assert fused.kept <= eager.kept
    assert fused.peak == fused.kept + fused.recomputed
    plain = stage_activations(small_config(precision="bf16", num_layers=4), 0, stream, FUSED)
    if granularity == "full":
        assert fused.layer == 1024 * 32 * 2 and fused.recomputed == plain.layer
    if granularity == "selective":  # attention here saves little already, and the whole projection stays alive
        assert fused.recomputed > 0
