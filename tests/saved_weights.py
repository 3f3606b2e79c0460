"""The weights in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.runtime.checkpoint import load_weights, read_checkpoint_info
from recipes.cli.config import build

__all__ = ["saved_weights"]


def saved_weights(folder: Path, world: torch.device) -> dict[str, Tensor]:
    """The parameters of a checkpoint's model, on one rank."""
    model = build_gpt(build(GPTModelConfig, read_checkpoint_info(folder)["model"]), world)
    load_weights(folder, model)
    return {name: p.detach() for name, p in model.named_parameters()}
