"""What the ranks of a layout do with one block: rank it, train it alone, write it, read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.blocks.blocks import tapped, train_only_block
from megatron_ext.blocks.delta import apply_delta, block_digest, block_weights, save_delta
from megatron_ext.blocks.importance import ESTIMATORS, BiasProbe, rank_blocks
from megatron_ext.models import build_gpt
from megatron_ext.runtime.engine import Engine
from tests.distributed.scenarios import copies, optim
from tests.distributed.sharding import load_full, ranks_here
from tests.engine_cases import counts, grpo, make_microbatches
from tests.gpt_cases import Rollout, randomize, small_config

__all__ = ["BlockCase", "blocks"]


@dataclass
class BlockCase:
    """fields: changes to `small_config`. weights: of the full model, or a seed to make them from (one rank only).
    folder: of the deltas, one for each block of `trained`; written by one rank, else read."""

    fields: dict[str, Any]
    weights: dict[str, Tensor] | int
    rollout: Rollout
    cuts: list[list[int]]
    probe: BiasProbe
    trained: list[int]
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
    rankings = {name: rank_blocks(name, model, case.probe) for name in ESTIMATORS}
    found = [
        train(device, config, weights, case, block, name, first) for block in case.trained for name in case.optimizers
    ]
    return {"ranks": ranks_here(), "weights": weights, "rankings": rankings, "trained": found}


def train(device, config, weights, case: BlockCase, block: int, name: str, first: bool) -> dict[str, Any]:
    """Two steps of one block; what changed, what it cost, and what its delta does."""
    model = build_gpt(config, device)
    load_full(model, weights)
    whole = block_weights(model, block)
    base = block_digest(whole) if whole else None
    names = train_only_block(model, block)
    engine = Engine(model, optim(name), total_steps=2)
    graph: list[tuple[int, bool, bool]] = []

    def watch(number: int, before: Tensor, after: Tensor) -> None:
        graph.append((number, before.requires_grad, after.requires_grad))

    losses = []
    with tapped(model, watch):
        for _ in range(2):
            losses.append(engine.update(make_microbatches(case.rollout, case.cuts, counts(case.rollout)), grpo))
    (piece,) = engine.pieces
    buffers = [*piece.buffers, *piece.expert_parallel_buffers]
    optimizers = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    path = case.folder / f"{block}-{name}.safetensors"
    if first:
        save_delta(path, model, block, base)
    after = block_weights(model, block)
    patched = build_gpt(config, device)
    load_full(patched, weights)
    chosen = apply_delta(path, patched)
    return {
        "block": block,
        "name": name,
        "names": names,
        "losses": losses,
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
