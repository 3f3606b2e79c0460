"""Some steps, a checkpoint, some more: under one layout, or begun under one and gone on with under another."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.blocks.places import parse_places
from megatron_ext.blocks.training import train_only_places
from megatron_ext.errors import UserError
from megatron_ext.models import build_gpt
from megatron_ext.runtime.checkpoint import CheckpointSave, load_optimizer, load_weights, save_checkpoint
from megatron_ext.runtime.engine import Engine
from tests.distributed.scenarios import copies, optim
from tests.distributed.sharding import load_full, ranks_here
from tests.edges import Edges
from tests.engine_cases import counts, grpo, make_microbatches
from tests.gpt_cases import Rollout, small_config

__all__ = ["ResumeCase", "refused", "resume"]


@dataclass
class ResumeCase:
    """optimizer: its name. place: trained alone, None for all. load: checkpoint to go on from, None: start from weights.
    steps: (before saving, after). save: where to save between."""

    fields: dict[str, Any]
    weights: dict[str, Tensor]
    rollout: Rollout
    cuts: list[list[int]]
    optimizer: str
    place: Any
    steps: tuple[int, int]
    save: Path | None = None
    load: Path | None = None


def resume(device: torch.device, cases: list[ResumeCase]) -> list[dict[str, Any]]:
    return [one(device, case) for case in cases]


def one(device: torch.device, case: ResumeCase) -> dict[str, Any]:
    model = build_gpt(small_config(**case.fields), device)
    load_full(model, case.weights)
    if case.place is not None:
        train_only_places(model, parse_places(case.place))
    if case.load:
        load_weights(case.load, model)
    engine, edges = Engine(model, optim(case.optimizer), total_steps=10), Edges()
    if case.load:
        load_optimizer(case.load, model, engine.optimizer)
        engine.scheduler.step(increment=case.steps[0])
    else:
        with edges:
            for _ in range(case.steps[0]):
                step(engine, case)
        if case.save:
            save_checkpoint(case.save, model, {}, engine.optimizer)
    with edges:
        losses = [step(engine, case) for _ in range(case.steps[1])]
    return {"ranks": ranks_here(), "parameters": copies(model), "losses": losses, "clear": edges.clear}


def step(engine: Engine, case: ResumeCase) -> dict[str, float]:
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return engine.update(make_microbatches(case.rollout, case.cuts[rank::ranks], counts(case.rollout)), grpo)


def refused(device: torch.device, folder: Path, hurt: int) -> list[str]:
    """What this rank is told where rank `hurt` cannot write its files: in the foreground, in the background."""
    model = build_gpt(small_config(num_layers=2, tensor_model_parallel_size=dist.get_world_size()), device)
    if dist.get_rank() == hurt:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    found = []
    for in_background in (False, True):
        try:
            CheckpointSave(folder / "checkpoint", model, {}, in_background=in_background).finish()
        except UserError as error:
            found.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return found
