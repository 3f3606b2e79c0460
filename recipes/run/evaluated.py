"""A checkpoint that is evaluated, and not trained: its architecture is read from it."""

from __future__ import annotations

import dataclasses
from typing import Any

from recipes.cli.config import build
from recipes.run.inputs import Inputs
from recipes.run.pretrained import Pretrained
from recipes.run.settings import TrainedModel

__all__ = ["checkpoint_inputs"]


def checkpoint_inputs(config: Any) -> Inputs:
    """
    Args:
        config: whose `model` says how the checkpoint is run; in what is returned it says all of the architecture, too.

    Raises:
        UserError: see `Pretrained.open` and `Inputs.check`.
    """
    architecture = Pretrained.open(config.pretrained_checkpoint.restore_from_path).architecture
    model = build(TrainedModel, architecture | dataclasses.asdict(config.model), "model")
    return Inputs.check(dataclasses.replace(config, model=model))
