"""The blocks of a pipelined GPT: find them, watch them, change what they say.

Blocks are transformer layers, counted from 0 over all pipeline stages.

Shape legend: t rows of the stream, b = 1, h hidden size, tp tensor-parallel size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from megatron_ext.adapters import adapter_parameters
from megatron_ext.errors import UserError
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.pieces import layers_of

__all__ = ["block_prefix", "blocks_here", "check_block", "tapped", "train_only"]

Tap = Callable[[int, Tensor, Tensor], Tensor | None]


def blocks_here(model: PrefixGroupedGPT) -> dict[int, torch.nn.Module]:
    """The blocks of this pipeline stage by number."""
    return {layer.layer_number - 1: layer for layer in layers_of(model)}


def block_prefix(block: int) -> str:
    """Of a block's parameters, by its number in the whole model."""
    return f"decoder.layers.{block}."


def check_block(block: int, num_layers: int) -> None:
    """
    Raises:
        UserError: the model has no such block.
    """
    if not 0 <= block < num_layers:
        raise UserError(f"block {block} does not exist: the model has {num_layers} blocks, 0 to {num_layers - 1}")


def train_only(model: PrefixGroupedGPT, modules: Iterable[torch.nn.Module]) -> None:
    """Let the parameters of these modules alone have gradients; adapters have none."""
    chosen = {id(p) for module in modules for p in module.parameters()}
    chosen -= {id(p) for p in adapter_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


@contextlib.contextmanager
def tapped(model: PrefixGroupedGPT, tap: Tap) -> Iterator[None]:
    """While inside, call `tap(block, hidden_in, hidden_out)` for every block of this stage that runs.

    Hidden states are [t (/ tp), 1, h], before the final norm. What the tap returns takes hidden_out's place; None leaves
    it.
    """

    def hook(number: int):
        def call(layer, args, kwargs, output):
            hidden, *rest = output
            changed = tap(number, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], hidden)
            return None if changed is None else (changed, *rest)

        return call

    handles = [
        layer.register_forward_hook(hook(number), with_kwargs=True) for number, layer in blocks_here(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
