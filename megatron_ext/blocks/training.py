"""Train places of a model alone: blocks, attention or MLP of one, single heads."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.adapters import has_adapters, keep_adapters, train_adapters
from megatron_ext.blocks.blocks import blocks_here
from megatron_ext.blocks.places import ModelPlace, check_places, head_rows
from megatron_ext.errors import UserError
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.optimizer_state import trained_parameters
from megatron_ext.runtime.slices import ParameterSlice

__all__ = ["train_only_places"]


def train_only_places(model: PrefixGroupedGPT, places: Sequence[ModelPlace]) -> list[str]:
    """Freeze all of this stage but some places, or their adapters: those elsewhere are taken away. Returns the names of what
    trains here, none on stages without a place. Of heads that are slices of parameters (`megatron_ext.runtime.slices`).

    Do it before the engine is made: buffers, optimizer state and backward passes follow `requires_grad`.

    Raises:
        UserError: the model has no such place, or a part of a block of a model with adapters.
    """
    config, here = model.model_config, blocks_here(model)
    check_places(places, config.num_layers, config.num_attention_heads)
    mine = [(here[place.block], place) for place in places if place.block in here]
    if has_adapters(model):
        if named := next((place for place in places if place.part is not None), None):
            raise UserError(
                f"block {named.name}: of a model with adapters whole blocks train; which of their linears have some, "
                "model.peft.target_modules says"
            )
        keep_adapters(model, [layer for layer, _ in mine])
        train_adapters(model)
        return list(trained_parameters(model))
    chosen = {
        id(parameter)
        for layer, place in mine
        if not place.heads
        for name, parameter in layer.named_parameters()
        if place.holds(name)
    }
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    for layer, place in mine:
        if place.heads:
            for rows in head_rows(layer, config, place.heads, model.pg_collection.tp):
                ParameterSlice(rows.module, rows.parameter, rows.dim, rows.mine)
    return list(trained_parameters(model))
