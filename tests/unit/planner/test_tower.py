"""Operations of a vision tower: what transformers' module computes, and how often a step runs it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.planner import estimate
from megatron_ext.planner.tower import forward_flops, tower_flops
from megatron_ext.vision import Pixels, VisionConfig
from megatron_ext.vision.kinds import build_tower, read_tower_config
from tests.gpt_cases import small_config
from tests.unit.planner.cases import PERFECT, ROUND, job
from tests.vision_cases import TOWERS, patches, qwen_tower

KINDS = ["clip", "siglip", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 176, "image_size": 48, "patch_size": 4}


def eyes(kind: str, **changes) -> VisionConfig:
    tower = TOWERS[kind] | SIZES if kind in TOWERS else qwen_tower(kind)
    tower |= {"vision_use_head": False} if kind == "siglip" else {}
    return VisionConfig(tower_config=read_tower_config(tower, "here"), **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_are_computed(kind, rng):
    """Of the products of the module itself, counted while it runs."""
    vision = eyes(kind)
    tower = build_tower(vision.tower_config, torch.device("cpu"))
    if kind in TOWERS:
        side = SIZES["image_size"] // SIZES["patch_size"]
        shown = Pixels(torch.randn(3, 3, SIZES["image_size"], SIZES["image_size"], generator=rng), (3, side, side))
    else:
        shown = patches(rng, 2, 8, 8)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):  # of which all is counted
        vision.kind.features(tower, [shown], vision.layers, vision.vision_feature_select_strategy == "default")
    tokens = torch.Size(vision.kind.grid(vision.tower_config, shown.patches)).numel()
    found = forward_flops(small_config(vision=vision), tokens, 64)
    # CLIP's token before the patches shows no pixels.
    assert found.total == pytest.approx(counter.get_total_flops(), rel=2e-3 if kind == "clip" else 1e-9)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_how_often_a_step_runs_it(ranks, rng):
    """A frozen one once for each clip, where it is kept; clips of a stream are shared by the ranks that see it. Else in every
    pass."""
    sizes = {"tensor_model_parallel_size": ranks}
    streams, each, updates, scored = 3, 4, 2, 1
    fields = {
        "groups": 8 // ranks * streams * each,
        "groups_per_stream": each,
        "updates": updates,
        "scoring_passes": scored,
    }

    def runs(vision: VisionConfig, **changes) -> float:
        made = job({"vision": vision} | sizes | changes, media_tokens=768, **fields)
        return tower_flops(made, 64).total / forward_flops(made.model, 768, 64).total

    clips = streams * updates * -(-each // ranks)
    assert runs(eyes("siglip")) == clips == runs(eyes("siglip", cache_gib=0.0, cache_folder="somewhere"))
    assert runs(eyes("siglip", cache_gib=0.0)) == clips * (1 + scored + 1)  # sampling, scoring, training
    trained = {"freeze_vision_model": False}
    assert runs(eyes("siglip"), **trained) == streams * updates * each * (1 + scored + 3)
    again = trained | {"activations_checkpoint_granularity": "full"}
    assert runs(eyes("siglip"), **again) == streams * updates * each * (1 + scored + 4)


def test_seconds_by_hand():
    """One petaflop a second; no tower, no second."""
    vision = eyes("siglip")
    made = job({"vision": vision}, media_tokens=768, groups=16, updates=2)
    step, blind = (estimate(j, ROUND, PERFECT).step for j in (made, dataclasses.replace(made, media_tokens=0)))
    rows, layer = 768, 4 * 64**2 + 2 * 64 * 176
    linear = 2 * rows * (4 * layer + 3 * 4 * 4 * 64)
    attention = 4 * 4 * 64 * rows * 144
    assert step.tower == pytest.approx(2 * 2 * (linear + attention) / 1e15)
    assert blind.tower == 0 and step.total == pytest.approx(blind.total + step.tower)
    assert "tower" in step.parts() and "tower" not in blind.parts()
