"""Bytes that a model, its engine and autograd hold, every storage once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_ext.grouping import PackedTokens
from megatron_ext.runtime.activation_offload import LayerInputs
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.lean_adam import HOST
from megatron_ext.runtime.optimizer_state import single_optimizers

__all__ = ["engine_storages", "optimizer_tensors", "saved_bytes", "saved_here_and_there", "storages"]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage once, by its address."""
    found = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and (storage := tensor.untyped_storage()).nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def optimizer_tensors(optimizer) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the weights it updates and of Adam's moments, of all optimizers in a chain."""
    for part in single_optimizers(optimizer):
        if part.optimizer is None:  # nothing trains here
            continue
        for group in part.optimizer.param_groups:
            yield from (("main", p) for p in group["params"])
        for state in part.optimizer.state.values():
            yield from ((name, value) for name, value in state.items() if name != "step")


def engine_storages(engine: Engine) -> dict[str, dict[int, int]]:
    """Storages of parameters, gradients and, once it has stepped, what the optimizer holds beside them, also on the host."""
    kinds = {
        "parameters": storages(engine.module.parameters()),
        "gradients": storages(
            b.grad_data for piece in engine.pieces for b in (*piece.buffers, *piece.expert_parallel_buffers)
        ),
    }
    known = {key for found in kinds.values() for key in found}
    tensors = list(optimizer_tensors(engine.optimizer))
    kinds["host"] = storages(t for name, t in tensors if name.startswith(HOST))
    state = storages(t for name, t in tensors if not name.startswith(HOST))
    return kinds | {"optimizer": {k: v for k, v in state.items() if k not in known}}


def saved_bytes(model: torch.nn.Module, batch: PackedTokens) -> int:
    """What autograd saves in one forward pass on the device, every storage once, without parameters."""
    return saved_here_and_there(model, batch)[0]


def saved_here_and_there(model: torch.nn.Module, batch: PackedTokens) -> tuple[int, int]:
    """What it saves on the device, and on the host: layers' inputs."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice
    there: list[int] = []
    pack = LayerInputs.pack

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    def packed(self: LayerInputs, tensor: Tensor):
        """Hooks around layers are asked instead of those around all."""
        found = pack(self, tensor)
        if isinstance(found, Tensor):
            return keep(found)
        there.append(found.host.nbytes)
        return found

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with patch.object(LayerInputs, "pack", packed), hooks:
        model(batch.tokens, batch.position_ids, batch.groups, labels=batch.labels, media=batch.media)
    return sum(storage.nbytes() for storage in kept.values()), sum(there)
