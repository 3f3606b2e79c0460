"""Bytes that autograd keeps for media, and for what a GPU's operations keep less of. Text: tests/distributed/test_planner.py."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_ext.models import build_gpt
from megatron_ext.models.config import PositionEmbedding, VisionConfig
from megatron_ext.models.media import MediaPrompt, pack_prompts
from megatron_ext.planner.activations import EAGER, FUSED, Implementation, StreamShape, on_gpu, stage_activations
from megatron_ext.rotary import Text, Video
from tests.gpt_cases import small_config
from tests.held_bytes import saved_bytes
from tests.layouts import randn


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
        media_tokens=len(batch.media.features),
    )
    planned = stage_activations(config, 0, stream, EAGER)
    assert planned.input > 2 * video.length * features * 4
    assert planned.kept == pytest.approx(saved_bytes(model, batch), rel=0.1)


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
