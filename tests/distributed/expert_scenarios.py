"""What ranks that share experts compute in the tests of experts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.grouping.routes import Routes, stream_routes, without_routes
from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.runtime.checkpoint import load_optimizer, load_weights, save_checkpoint
from megatron_ext.runtime.engine import Engine
from tests.distributed.data_scenarios import DataCase, data_run
from tests.distributed.scenarios import copies, optim
from tests.distributed.sharding import expert_ranks_here, load_full, ranks_here
from tests.engine_cases import counts, grpo, make_microbatches
from tests.gpt_cases import small_config

__all__ = ["gone_on_twice", "replayed", "spread"]

OPTIMIZERS = ("adam", "distributed_fused_adam")


def spread(device: torch.device, case: DataCase) -> dict[str, Any]:
    """Gradients, and what a step makes of the weights and of experts' biases."""
    rank, stage = ranks_here()
    return {
        "rank": rank,
        "stage": stage,
        "experts": expert_ranks_here(),
        "gradients": data_run(device, case, "token", "adam", step=False),
        "steps": {name: data_run(device, case, "token", name, step=True) for name in OPTIMIZERS},
    }


def gone_on_twice(device: torch.device, case: DataCase, folder: Path) -> list[dict[str, Tensor]]:
    """Weights behind three steps of Adam: of a run that went on from a checkpoint once, and twice."""
    data, config = parallel_state.get_data_parallel_rank(), small_config(**case.fields)
    batches = make_microbatches(case.rollout, case.spread[data], counts(case.rollout), pad=stream_multiple(config))

    def run(load: Path | None, save: Path | None, steps: int) -> dict[str, Tensor]:
        model = build_gpt(config, device)
        load_full(model, case.weights)
        engine = Engine(model, optim("adam"), total_steps=9)
        if load is not None:
            load_weights(load, model)
            load_optimizer(load, model, engine.optimizer)
        for number in range(steps):
            engine.update(batches, grpo)
            if number == 0 and save is not None:
                save_checkpoint(save, model, {}, engine.optimizer)
        return copies(model)

    run(None, folder / "first", 1)
    once = run(folder / "first", folder / "second", 2)
    return [once, run(folder / "second", None, 1)]


def replayed(device: torch.device, case: DataCase, other: dict[str, Tensor], routes: list) -> dict[str, Any]:
    """Scores of one microbatch by the case's weights; by other weights, whose routers are free; whose tokens take the experts of
    the first (R2), and of given `routes` of every response (R3). Rows that were told, and how many there are."""
    config = small_config(**case.fields)
    model = build_gpt(config, device)
    load_full(model, case.weights)
    engine = Engine(model)
    batches = make_microbatches(case.rollout, case.spread[0], counts(case.rollout), pad=stream_multiple(config))
    streams = [m.batch.groups for m in batches]
    recorded = [Routes.record(stream) for stream in streams]
    found = {"old": engine.score(batches)}
    for one in recorded:
        one.follow()
    load_full(model, other)
    found["R2"] = engine.score(batches)
    found["R2 followed"] = [one.followed for one in recorded]
    with without_routes(streams):
        found["free"] = engine.score(batches)
    model.zero_grad()
    engine.run(batches, grpo)
    found["gradient"] = model.decoder.layers[0].mlp.router.weight.grad.clone()
    layers, topk = config.num_layers, config.moe_router_topk
    first = 0
    for stream in streams:
        mine = routes[first : first + stream.num_responses]
        first += stream.num_responses
        found.setdefault("tables", []).append(stream_routes(stream, mine, layers, topk))
        Routes.given(stream, found["tables"][-1])
    found["R3"] = engine.score(batches)
    found["R3 followed"] = [Routes.of(stream).followed for stream in streams]
    return found
