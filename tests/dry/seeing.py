"""Steps of models that see, on every tower and connector, for tests/dry/steps.py."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ext.models import PrefixGroupedGPT
from megatron_ext.models.config import PositionEmbedding, stream_multiple
from megatron_ext.models.media import MediaPrompt, pack_prompts
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.optim import OptimConfig
from megatron_ext.vision import VisionConfig
from recipes.niah.task import FEATURES, VOCABULARY, draw_sample
from recipes.sft.batches import SFTMicrobatch, negative_log_likelihood
from tests import vision_cases

__all__ = ["FILMS", "TOWERS", "films", "images", "patches", "pictures", "tiles"]


def films(model: PrefixGroupedGPT, device: torch.device) -> None:
    """Clips that questions share."""
    config, rng = model.model_config, torch.Generator().manual_seed(1)
    samples = [draw_sample(rng, frames, 2, 2) for frames in (2, 3)]
    prompts, questions = [s.prompt for s in samples], [s.questions for s in samples]
    batch = pack_prompts(prompts, questions, config.position_embedding.scheme, stream_multiple(config), device)
    engine = Engine(model, OptimConfig())
    engine.update([SFTMicrobatch(batch, learnt=batch.loss_mask(), global_tokens=16.0)], negative_log_likelihood)


def pictures(model: PrefixGroupedGPT, device: torch.device) -> None:
    """Two prompts that show one clip to a tower, and one of text; twice."""
    clip = vision_cases.pictures(torch.Generator().manual_seed(1), 2)
    shown(model, device, [vision_cases.image_prompt(torch.Generator().manual_seed(2), [1, clip, 1])] * 2)


def patches(model: PrefixGroupedGPT, device: torch.device) -> None:
    """A picture and a video of another size, as Qwen's towers take them."""
    rng = torch.Generator().manual_seed(1)
    parts = [2, vision_cases.patches(rng, 1, 4, 4), 1, vision_cases.patches(rng, 2, 2, 4)]
    shown(model, device, [vision_cases.qwen_prompt(rng, parts, model.model_config.position_embedding.scheme)])


def tiles(model: PrefixGroupedGPT, device: torch.device) -> None:
    """An image that is cut into tiles, and a video whose frames keep a part of their tokens."""
    rng = torch.Generator().manual_seed(1)
    parts = [2, vision_cases.cut_image(rng), 1, vision_cases.tiles(rng, 2, video=True)]
    shown(model, device, [vision_cases.onevision_prompt(rng, parts)])


def images(model: PrefixGroupedGPT, device: torch.device) -> None:
    """Two images, each cut into tiles."""
    rng = torch.Generator().manual_seed(1)
    parts = [2, vision_cases.next_image(rng), 1, vision_cases.next_image(rng)]
    shown(model, device, [vision_cases.onevision_prompt(rng, parts)])


def shown(model: PrefixGroupedGPT, device: torch.device, prompts: list[MediaPrompt]) -> None:
    config = model.model_config
    batch = pack_prompts(
        [*prompts, [1, 2]],
        [[[3, 4]]] * (len(prompts) + 1),
        config.position_embedding.scheme,
        stream_multiple(config),
        device,
    )
    engine = Engine(model, OptimConfig(vision_projection_lr=1e-3))
    for _ in range(2):
        engine.update([SFTMicrobatch(batch, learnt=batch.loss_mask(), global_tokens=4.0)], negative_log_likelihood)


FILMS = {
    "vision": VisionConfig(FEATURES), "vocab_size": VOCABULARY, "position_embedding": PositionEmbedding("vrope"),
}  # fmt: skip
# By name: fields of a model.
TOWERS: dict[str, dict[str, Any]] = {
    "siglip": {"vision": VisionConfig(tower_config=vision_cases.TOWERS["siglip"])},
    "clip": {
        "vision": VisionConfig(
            tower_config=vision_cases.TOWERS["clip"], vision_feature_layer=[-2, -1], connector_bias=False,
            connector_activation="relu",
        ),
    },
    "onevision": {
        "vision": VisionConfig(tower_config=vision_cases.onevision_tower(), connector="onevision", **vision_cases.ONEVISION),
    },
    "llava_next": {
        "vision": VisionConfig(tower_config=vision_cases.TOWERS["clip"], connector="onevision", **vision_cases.NEXT),
    },
    **{
        family: {
            "vision": VisionConfig(tower_config=vision_cases.qwen_tower(family)),
            "position_embedding": PositionEmbedding(family, sections=[2, 1, 1]),
        }
        for family in vision_cases.QWEN
    },
}  # fmt: skip
