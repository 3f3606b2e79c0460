"""What data-parallel ranks compute of one batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.losses.objective import NORMALISATIONS
from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.runtime.engine import Engine
from tests.distributed.layout_scenarios import _norms
from tests.distributed.scenarios import CLIP, OPTIMIZERS, copies, refuses_step
from tests.distributed.sharding import load_full, ranks_here
from tests.engine_cases import counts, grpo, make_microbatches
from tests.gpt_cases import Rollout, randomize, small_config

__all__ = ["DataCase", "data_parallel", "data_run"]


@dataclass
class DataCase:
    """One batch for `data_parallel`: `spread[rank]` holds the microbatches (group numbers) of a data-parallel rank."""

    fields: dict[str, Any]
    weights: dict[str, Tensor]
    rollout: Rollout
    spread: list[list[list[int]]]


def data_parallel(device: torch.device, case: DataCase) -> dict[str, Any]:
    """Gradients for every normalisation, and parameters after a step of both optimizers."""
    rank, _ = ranks_here()
    return {
        "rank": rank,
        "gradients": {level: data_run(device, case, level, "adam", step=False) for level in NORMALISATIONS},
        "steps": {name: data_run(device, case, "token", name, step=True) for name in OPTIMIZERS},
    }


def data_run(device: torch.device, case: DataCase, level: str, optimizer: str, step: bool) -> dict[str, Any]:
    config = small_config(**case.fields)
    model = build_gpt(config, device)
    number = parallel_state.get_data_parallel_rank()
    # Only the first data-parallel rank gets the weights: the engine must tell the others.
    randomize(model, torch.Generator().manual_seed(number))
    if number == 0 or config.expert_model_parallel_size > 1:  # whose experts nobody else has
        load_full(model, case.weights)
    engine = Engine(model, OPTIMIZERS[optimizer], clip_grad=CLIP)
    started = copies(model)
    cuts = case.spread[number]
    mine = case.rollout.pick([g for numbers in cuts for g in numbers])
    local = counts(mine)
    sums = torch.tensor(list(local.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    totals = dict(zip(local, sums.tolist(), strict=True))
    microbatches = make_microbatches(case.rollout, cuts, totals, level, pad=stream_multiple(config))
    engine.zero_grad()
    result = {"started": started, "totals": totals}
    result["metrics"] = engine.reduce_metrics(engine.run(microbatches, grpo))
    if not step:
        return result | {"gradients": {name: p.main_grad.clone() for name, p in model.named_parameters()}}
    result["norms"] = _norms(engine, device)
    result |= {"report": engine.step(), "stepped": copies(model)}
    result["biases"] = {name: b.clone() for name, b in model.named_buffers() if name.endswith("expert_bias")}
    # NaN on the last rank alone: all must refuse, or their weights would part.
    factor = math.nan if number == parallel_state.get_data_parallel_world_size() - 1 else 1.0
    engine.zero_grad()
    engine.run(microbatches, lambda microbatch, logprobs, entropy: (logprobs.sum() * factor, {}))
    return result | {"refused": refuses_step(engine), "after refusal": copies(model)}
