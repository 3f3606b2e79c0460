"""What the ranks of a layout do with places of a model: rank them, train some alone, write them, read them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.bias.ranking import BlockRanking
from megatron_ext.blocks.blocks import tapped
from megatron_ext.blocks.delta import apply_delta, base_digest, place_weights, save_delta
from megatron_ext.blocks.importance import ESTIMATORS, BiasProbe, rank_blocks
from megatron_ext.blocks.places import ModelPlace, parse_places
from megatron_ext.blocks.training import train_only_places
from megatron_ext.models import build_gpt
from megatron_ext.runtime.engine import Engine
from tests.distributed.scenarios import copies, optim
from tests.distributed.sharding import expert_ranks_here, full_name, load_full, ranks_here
from tests.edges import Edges
from tests.engine_cases import counts, grpo, make_microbatches
from tests.gpt_cases import Rollout, randomize, small_config

__all__ = ["BlockCase", "ExpertDeltaCase", "blocks", "delta_of_experts", "rankings_of_experts"]


@dataclass
class BlockCase:
    """fields: changes to `small_config`. weights: of the full model, or a seed to make them from (one rank only).
    trained: places that train together, as a configuration has them. folder: of their deltas; written by one rank, else read."""

    fields: dict[str, Any]
    weights: dict[str, Tensor] | int
    rollout: Rollout
    cuts: list[list[int]]
    probe: BiasProbe
    trained: list[Any]
    folder: Path
    optimizers: list[str] = field(default_factory=lambda: ["adam", "distributed_fused_adam"])


def blocks(device: torch.device, case: BlockCase) -> dict[str, Any]:
    config = small_config(**case.fields)
    first = isinstance(case.weights, int)
    model = build_gpt(config, device)
    if first:
        randomize(model, torch.Generator().manual_seed(case.weights))
        weights = copies(model)
    else:
        weights = case.weights
    load_full(model, weights)
    rankings = every_ranking(model, case.probe)
    found = [
        train(device, config, weights, case, parse_places(spec), name, first)
        for spec in case.trained
        for name in case.optimizers
    ]
    return {"ranks": ranks_here(), "weights": weights, "rankings": rankings, "trained": found}


def every_ranking(model, probe: BiasProbe) -> dict[str, BlockRanking]:
    """By estimator and, of finer places, their grain."""
    found = {name: rank_blocks(name, model, probe) for name in ESTIMATORS}
    for name in ("gradient", "intervention"):
        found |= {f"{name} {grain}": rank_blocks(name, model, probe, grain=grain) for grain in ("parts", "heads")}
    return found


def train(
    device, config, weights, case: BlockCase, places: tuple[ModelPlace, ...], name: str, first: bool
) -> dict[str, Any]:
    """Two steps of these places; what changed, what it cost, and what their delta does."""
    model = build_gpt(config, device)
    load_full(model, weights)
    base = base_digest(place_weights(model, places))
    names = train_only_places(model, places)
    engine = Engine(model, optim(name), total_steps=2)
    graph: list[tuple[int, bool, bool]] = []

    def watch(number: int, before: Tensor, after: Tensor) -> None:
        graph.append((number, before.requires_grad, after.requires_grad))

    losses, edges = [], Edges()
    with tapped(model, watch), edges:
        for _ in range(2):
            losses.append(engine.update(make_microbatches(case.rollout, case.cuts, counts(case.rollout)), grpo))
    (piece,) = engine.pieces
    buffers = [*piece.buffers, *piece.expert_parallel_buffers]
    optimizers = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    path = case.folder / f"{', '.join(place.name for place in places)}-{name}.safetensors"
    if first:
        save_delta(path, model, places, base)
    after = place_weights(model, places)
    patched = build_gpt(config, device)
    load_full(patched, weights)
    chosen = apply_delta(path, patched)
    return {
        "places": places,
        "name": name,
        "names": names,
        "losses": losses,
        "clear": edges.clear,
        "graph": sorted(set(graph)),
        "gradient_bytes": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "gradient_numel": sum(b.grad_data.numel() for b in buffers),
        "state_bytes": sum((_bytes(o, model) for o in optimizers), Counter()),
        "parameters": copies(model),
        "whole": after,
        "chosen": chosen,
        "patched": copies(patched),
    }


def _bytes(optimizer, model) -> Counter:
    """What the optimizer holds on this rank beside the model's own memory, by use: bytes of whole storages."""
    inner = getattr(optimizer, "optimizer", optimizer)
    found: Counter = Counter()
    if inner is None:
        return found
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = [("master weights", p) for group in inner.param_groups for p in group["params"]]
    held += [(key, s) for state in inner.state.values() for key, s in state.items() if isinstance(s, Tensor)]
    for name, tensor in held:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[name] += storage.nbytes()
    return found


@dataclass
class ExpertDeltaCase:
    """fields: changes to `small_config`. weights, trained: of the full model, its experts' biases among them. places: of each
    delta, as a configuration has them. written: where deltas are left; applied: those that are put on `weights`."""

    fields: dict[str, Any]
    weights: dict[str, Tensor]
    trained: dict[str, Tensor]
    places: list[Any]
    written: Path
    applied: Path


def delta_of_experts(device: torch.device, case: ExpertDeltaCase) -> dict[str, Any]:
    """Of every delta: the whole tensors of its places, and what another one of the same places makes of this rank's."""
    config = small_config(**case.fields)
    model, found = build_gpt(config, device), []
    for number, spec in enumerate(case.places):
        places, name = parse_places(spec), f"{number}.safetensors"
        _load(model, case.weights)
        base = base_digest(place_weights(model, places))
        _load(model, case.trained)
        save_delta(case.written / name, model, places, base)
        whole = place_weights(model, places)
        _load(model, case.weights)
        apply_delta(case.applied / name, model)
        found.append((whole, copies(model) | {n: b.clone() for n, b in _biases(model).items()}))
    return {"ranks": ranks_here(), "experts": expert_ranks_here(), "deltas": found}


def _load(model, weights: dict[str, Tensor]) -> None:
    load_full(model, weights)
    for name, buffer in _biases(model).items():
        buffer.copy_(weights[full_name(name, model.model_config, ranks_here()[1])])


def _biases(model) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")}


def rankings_of_experts(
    device: torch.device, fields: dict[str, Any], weights: dict[str, Tensor], probe: BiasProbe
) -> dict[str, BlockRanking]:
    """In fp64: of many tokens one may be so close to another expert that each layout's own rounding would decide in fp32."""
    model = build_gpt(small_config(**fields), device)
    _load(model, weights)
    model.config.pipeline_dtype = torch.float64
    return every_ranking(model.double(), probe)
