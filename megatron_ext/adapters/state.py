"""All adapters of a model: start them, train them alone, run the model without them, merge them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch.nn import Module, Parameter

from megatron_ext.adapters.linears import Adapted

__all__ = [
    "adapted_linears", "adapter_parameters", "has_adapters", "keep_adapters", "merged", "start_adapters", "train_adapters",
    "without_adapters",
]  # fmt: skip


def adapted_linears(model: Module) -> dict[str, Adapted]:
    """Linears of this rank that have an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted) and m.lora is not None}


def has_adapters(model: Module) -> bool:
    """Whether the model is made to have adapters; this rank may hold none, where one block has them."""
    return any(isinstance(m, Adapted) for m in model.modules())


def adapter_parameters(model: Module) -> dict[str, Parameter]:
    """By name, in the model's order."""
    mine = {id(p) for linear in adapted_linears(model).values() for p in linear.lora.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in mine}


def start_adapters(layer: Module, init: str, seed: str) -> None:
    """Draw every A, alike on every layout of ranks; B is 0, so that the layer computes what it does without.

    Args:
        seed: of this layer in this run.
    """
    for name, linear in adapted_linears(layer).items():
        linear.lora.start(init, f"{seed} {_whole_name(layer, name)}")


def _whole_name(layer: Module, name: str) -> str:
    """With an expert's number among those of all ranks."""
    before, local, rest = name.partition(".local_experts.")
    if not local:
        return name
    number, _, linear = rest.partition(".")
    experts = layer.get_submodule(before)
    return f"{before}{local}{experts.ep_group.rank() * experts.num_local_experts + int(number)}.{linear}"


def train_adapters(model: Module) -> None:
    """Freeze all else."""
    mine = {id(p) for p in adapter_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in mine)


def keep_adapters(model: Module, kept: Iterable[Module]) -> None:
    """Take away all adapters that are not within these modules."""
    within = {id(m) for module in kept for m in module.modules()}
    for linear in adapted_linears(model).values():
        if id(linear) not in within:
            linear.lora = None


@contextlib.contextmanager
def without_adapters(model: Module) -> Iterator[None]:
    """Inside, the model computes what the frozen one does, bitwise."""
    linears = list(adapted_linears(model).values())
    try:
        for linear in linears:
            linear.uses_adapter = False
        yield
    finally:
        for linear in linears:
            linear.uses_adapter = True


@contextlib.contextmanager
def merged(model: Module) -> Iterator[None]:
    """Inside, weights have the adapters in them and nothing is computed beside; then they are what they were, to the last bit.
    Costs a second copy of the adapted weights meanwhile. All ranks call it; nothing is to be trained inside."""
    linears = list(adapted_linears(model).values())
    own = [linear.weight.data for linear in linears]
    with without_adapters(model):
        try:
            for linear in linears:
                linear.weight.data = linear.merged_weight()
            yield
        finally:
            for linear, weight in zip(linears, own, strict=True):
                linear.weight.data = weight
