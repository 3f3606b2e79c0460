"""Which parts of a model that sees are trained."""

from __future__ import annotations

import torch

from megatron_ext.models.config import GPTModelConfig

__all__ = ["CONNECTOR", "TOWER", "freeze", "is_frozen"]

TOWER = "vision_tower."
CONNECTOR = "media_projector."


def is_frozen(name: str, config: GPTModelConfig) -> bool:
    """Whether the configuration leaves a parameter as it is. Of a tower's, what features do not depend on never trains."""
    if name.startswith(TOWER):
        vision = config.vision
        used = vision.kind.used(name.removeprefix(f"{TOWER}model."), vision.tower_config, vision.layers)
        return config.freeze_vision_model or not used
    return config.freeze_vision_projection if name.startswith(CONNECTOR) else config.freeze_language_model


def freeze(model: torch.nn.Module, config: GPTModelConfig) -> None:
    """Say of every parameter whether it trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name, config))
