"""What evaluations of bias are compared by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.runtime.checkpoint import load_weights, read_checkpoint_info
from recipes.cli.config import build

__all__ = ["BOUND", "NUMBERS", "assert_same_numbers", "weights"]

BOUND = 1e-5
NUMBERS = (
    "afgb", "ub", "pronoun_mass", "hinted_pronoun_mass", "share_preferring_first", "perplexity", "afgb_interval",
    "ub_interval", "profession_table",
)  # fmt: skip


def weights(folder: Path, world: torch.device) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, whole."""
    model = build_gpt(build(GPTModelConfig, read_checkpoint_info(folder)["model"]), world)
    load_weights(folder, model)
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same_numbers(found: dict, expected: dict) -> None:
    for key in NUMBERS:
        if isinstance(expected[key], dict):
            assert found[key] == pytest.approx(expected[key], abs=BOUND), key
        else:
            assert found[key] == pytest.approx(expected[key], rel=BOUND, abs=BOUND), key
