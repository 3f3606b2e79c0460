"""A block's spec with adapters on its linears."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_ext.adapters.config import LoraConfig
from megatron_ext.adapters.linears import Adapted
from megatron_ext.adapters.lora import LoraShape

__all__ = ["adapted_spec", "lora_shapes"]

UNCALLED = ("linear_kv_up_proj",)  # whose matrices latent attention uses itself


def lora_shapes(
    lora: LoraConfig, linears: Mapping[str, Mapping[str, Any]], key_value_heads: int
) -> dict[str, dict[str, LoraShape]]:
    """Of each linear that has an adapter, by its place in a layer.

    Args:
        linears: `LinearShape` of all in the whole model, by place and name.
    """
    found: dict[str, dict[str, LoraShape]] = {}
    for place, some in linears.items():
        for linear, whole in some.items():
            if branches := lora.branches(linear):
                groups = key_value_heads if linear == "linear_qkv" else None
                shape = LoraShape(branches, whole.rows, groups, lora.dim, lora.scale, linear in UNCALLED)
                found.setdefault(place, {})[linear] = shape
    return found


def adapted_spec(
    block: TransformerBlockSubmodules, shapes: Mapping[str, Mapping[str, LoraShape]]
) -> TransformerBlockSubmodules:
    """The same block, with adapters of these shapes on its layers' linears."""
    adapted = copy.deepcopy(block)
    inners = [inner for layer in adapted.layer_specs for inner in _inners(layer.submodules)]
    for place, inner in {id(inner): (place, inner) for place, inner in inners}.values():  # layers share them
        for linear, shape in shapes.get(place, {}).items():
            if hasattr(inner, linear):
                setattr(inner, linear, Adapted.of(getattr(inner, linear), shape))
    return adapted


def _inners(layer: TransformerLayerSubmodules) -> Iterator[tuple[str, Any]]:
    """(place, spec of what has linears) of a layer."""
    yield "self_attention", layer.self_attention.submodules
    mlp = layer.mlp.submodules
    if not isinstance(mlp, MoESubmodules):
        yield "mlp", mlp
        return
    yield "mlp.experts", mlp.experts.submodules
    yield "mlp.shared_experts", mlp.shared_experts.submodules
