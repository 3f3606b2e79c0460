"""An optimizer's state in the shape of the parameters it belongs to, whatever the optimizer and however it is sharded.

Megatron's own formats tie a checkpoint to the optimizer's buffers, or assume a fused Adam. Here each parameter that trains
has exp_avg, exp_avg_sq and, in half precision, its fp32 master copy, cut over ranks as the parameter itself is: what one layout
saved any other loads, with or without the distributed optimizer, fused or torch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from megatron_ext.runtime.collectives import gather_objects
from megatron_ext.runtime.lean_adam import LeanAdamW
from megatron_ext.runtime.pieces import layers_of
from megatron_ext.runtime.slices import slice_of

__all__ = [
    "adam_step", "count_parameters", "load_optimizer_tensors", "own_part", "sharded_like_parameters",
    "sharded_optimizer_state", "single_optimizers", "trained_parameters",
]  # fmt: skip

MOMENTS, MASTER = ("exp_avg", "exp_avg_sq"), "master"


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """By name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Numbers of a model in all, the padding of its vocabulary among them, of which every rank names its own: what several
    tensor-parallel ranks hold alike, and a tied output's copy of the embedding, once. Not for experts that are spread over
    ranks. Collective over the model-parallel group."""
    once = (p for p in parameters if not getattr(p, "shared", False) and param_is_not_tensor_parallel_duplicate(p))
    return sum(gather_objects(sum(p.numel() for p in once), parallel_state.get_model_parallel_group()))


def sharded_optimizer_state(model: torch.nn.Module, optimizer, empty: bool = False) -> dict[str, Any]:
    """Sharded tensors of the whole state, by "<state>/<parameter name>"; every rank calls it.

    Args:
        empty: room to load into, not the values.
    """
    values: dict[str, dict[str, Tensor]] = {}
    holders = _holders(optimizer)
    for name, parameter in trained_parameters(model).items():
        for state, value in _whole(holders, parameter, empty).items():
            values.setdefault(state, {})[name] = value
    return {
        f"{state}/{name}": place
        for state, tensors in values.items()
        for name, place in sharded_like_parameters(model, tensors, f"optimizer.{state}").items()
    }


def sharded_like_parameters(model: torch.nn.Module, values: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Sharded tensors of values that have the shapes of parameters, by the parameters' names; `prefix` begins their keys. Those
    of a slice have the shape and the key of the parameter that it is of, with zeros around: any layout loads them."""
    # Layer by layer: Megatron's own stack of all layers has holes where some are frozen, and cannot be saved.
    states = [layer.sharded_state_dict(f"decoder.layers.{layer.layer_number - 1}.") for layer in layers_of(model)]
    places = {id(s.data): s for state in (model.sharded_state_dict(), *states) for s in _sharded(state)}
    parameters, found = dict(model.named_parameters()), {}
    for name, value in values.items():
        parameter = parameters[name]
        if (part := slice_of(parameter)) is not None:
            parameter, value = part.whole, part.widened(value)
        place = places[id(parameter)]
        changes = {"key": f"{prefix}.{place.key}", "data": value}
        if isinstance(place, ShardedTensor):
            changes["dtype"] = value.dtype
        found[name] = replace(place, **changes)
    return found


def own_part(parameter: torch.nn.Parameter, loaded: Tensor) -> Tensor:
    """What is a parameter's of a tensor that `sharded_like_parameters` laid out and a checkpoint has filled."""
    part = slice_of(parameter)
    return loaded if part is None else part.narrowed(loaded)


def load_optimizer_tensors(model: torch.nn.Module, optimizer, tensors: dict[str, Tensor], step: int) -> None:
    """Put what `sharded_optimizer_state` laid out and a checkpoint has filled into the optimizer.

    Args:
        step: optimizer steps taken, as `adam_step` told.
    """
    holders = _holders(optimizer)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            states = [state for state in (*MOMENTS, MASTER) if f"{state}/{name}" in tensors]
            flat = {state: own_part(parameter, tensors[f"{state}/{name}"]).flatten() for state in states}
            for shard in _shards(holders, parameter):
                shard.load({moment: flat[moment][shard.rows] for moment in MOMENTS}, step)
                if MASTER in flat:
                    shard.main.copy_(flat[MASTER][shard.rows].view_as(shard.main))
        for single in single_optimizers(optimizer):
            if not _is_torch_adam(single.optimizer):
                for group in single.optimizer.param_groups:
                    group["step"] = step


def adam_step(optimizer) -> int:
    """Steps taken, the same on every rank, also where this one holds no parameter."""
    steps = [0.0]
    for single in single_optimizers(optimizer):
        steps += [float(s["step"]) for s in single.optimizer.state.values() if "step" in s]
        steps += [float(g["step"]) for g in single.optimizer.param_groups if "step" in g and g["params"]]
    largest = torch.tensor([max(steps)], dtype=torch.float64)
    largest = largest.to(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


class _Shard:
    """What one optimizer on this rank holds of a parameter: `rows` of the flattened parameter, as `main` in `inner`."""

    def __init__(self, inner: torch.optim.Optimizer, main: Tensor, rows: slice):
        self.inner, self.main, self.rows = inner, main, rows

    def moments(self) -> dict[str, Tensor]:
        """None before the first step."""
        if isinstance(self.inner, LeanAdamW):
            return self.inner.moments(self.main)
        state = self.inner.state.get(self.main, {})
        return {moment: state[moment] for moment in MOMENTS if moment in state}

    def load(self, moments: dict[str, Tensor], step: int) -> None:
        """Flat moments, after so many steps."""
        if isinstance(self.inner, LeanAdamW):
            self.inner.load(self.main, moments, step)
            return
        state = self.inner.state[self.main]
        for moment, value in moments.items():
            state[moment] = value.view_as(self.main).to(self.main.device, torch.float32, copy=True)
        if _is_torch_adam(self.inner):
            state["step"] = torch.tensor(float(step))


def single_optimizers(optimizer) -> list:
    """Those that Megatron's is a chain of; the `optimizer` of each is torch's or a fused one, None where nothing trains."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _is_torch_adam(inner) -> bool:
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def _holders(optimizer) -> list[tuple[Any, set[int]]]:
    """Single optimizers, each with the ids of what it holds."""
    return [
        (
            single,
            {id(p) for group in single.optimizer.param_groups for p in group["params"]} if single.optimizer else set(),
        )
        for single in single_optimizers(optimizer)
    ]


def _shards(holders: list[tuple[Any, set[int]]], parameter: torch.nn.Parameter) -> Iterator[_Shard]:
    for single, held in holders:
        if not isinstance(single, DistributedOptimizer):
            main = getattr(parameter, "main_param", parameter)
            if id(main) in held:  # experts over ranks have an optimizer of their own
                yield _Shard(single.optimizer, main, slice(None))
        elif parameter in single.model_param_group_index_map:
            group, place = single.model_param_group_index_map[parameter]
            mine = single._get_model_param_range_map(parameter)["param"]
            yield _Shard(
                single.optimizer, single.optimizer.param_groups[group]["params"][place], slice(mine.start, mine.end)
            )


def _whole(holders: list[tuple[Any, set[int]]], parameter: torch.nn.Parameter, empty: bool) -> dict[str, Tensor]:
    """The parameter's state in its own shape, fp32, on the host, gathered from the data-parallel ranks that share it."""
    states = [*MOMENTS, *([MASTER] if parameter.dtype != torch.float32 else [])]
    device = "cpu" if empty else parameter.device
    whole = {state: torch.zeros(parameter.shape, dtype=torch.float32, device=device) for state in states}
    if empty:
        return whole
    for shard in _shards(holders, parameter):
        values = {**shard.moments(), MASTER: shard.main}
        for state in states:
            if state in values:
                whole[state].view(-1)[shard.rows] = values[state].detach().reshape(-1)
    if any(isinstance(single, DistributedOptimizer) for single, _ in holders):
        if getattr(parameter, "allreduce", True):
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        else:  # of an expert, which not all of them have
            group = parallel_state.get_expert_data_parallel_group()
        for value in whole.values():  # each number lies on one rank, the others add 0
            dist.all_reduce(value, group=group)
    return {state: value.cpu() for state, value in whole.items()}  # a GPU has no room for all parameters'


def _sharded(node) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    if isinstance(node, (ShardedTensor, ShardedTensorFactory)):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _sharded(value)
