"""Experts of a Hugging Face model: what its config.json says of them, and tensors that hold all experts of a layer."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.hf.families import Family, spelled
from megatron_ext.hf.files import DTYPES, Stored
from megatron_ext.hf.raw import integer, number, switch
from megatron_ext.models.expert_config import layers_with_experts

__all__ = ["read_experts", "unpacked", "write_experts"]

ONE_GROUP = "greedy"  # DeepSeek-V2's topk_method that asks for no groups, whatever numbers stand beside it
# What transformers 5 makes of a layer's experts, and how one expert's tensors lie in it, one behind the other.
PACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)")
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def read_experts(family: Family, config: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    """Fields of `GPTModelConfig` that are about experts; none for a family without.

    Raises:
        UserError: numbers that cannot be.
    """
    if not family.experts:
        return {}
    freq = _sparse_layers(config, layers, where)
    if freq is None:
        return {}
    fields: dict[str, Any] = {ours: integer(config, theirs, where) for ours, theirs in family.experts.items()}
    if "norm_topk_prob" in config:
        fields["moe_router_norm_topk_prob"] = switch(config, "norm_topk_prob", where)
    if "n_shared_experts" in config:
        shared = integer(config, "n_shared_experts", where)
        fields["moe_shared_expert_intermediate_size"] = shared * fields["moe_ffn_hidden_size"]
    if "routed_scaling_factor" in config:
        factor = number(config, "routed_scaling_factor", where)
        fields["moe_router_topk_scaling_factor"] = None if factor == 1 else float(factor)
    if "n_group" in config:
        fields |= _groups(family, config, where)
    return family.routing | fields | {"moe_layer_freq": freq}


def _sparse_layers(config: dict[str, Any], layers: int, where: str) -> int | list[int] | None:
    """model.moe_layer_freq; None: no layer has experts."""
    if "mlp_layer_types" in config:
        types = config["mlp_layer_types"]
        if types is None:
            types = ["dense", *["sparse"] * (layers - 1)]
        if not isinstance(types, list) or len(types) != layers or any(t not in ("dense", "sparse") for t in types):
            raise UserError(
                f"{where}: mlp_layer_types must name dense or sparse for each of {layers} layers, got {str(types)[:80]}; fetch "
                "the file again"
            )
        freq = [int(t == "sparse") for t in types]
        if not any(freq):
            return None
    elif "first_k_dense_replace" in config:
        dense = integer(config, "first_k_dense_replace", where, least=0)
        freq = [int(layer >= dense) for layer in range(layers)]
        if not any(freq):
            return None
    elif "decoder_sparse_step" in config:
        step = integer(config, "decoder_sparse_step", where)
        named = config["mlp_only_layers"] or []
        if not isinstance(named, list) or not all(isinstance(layer, int) for layer in named):
            raise UserError(
                f"{where}: mlp_only_layers must be a list of layers, got {str(named)[:80]}; fetch the file again"
            )
        freq = [int(layer not in named and (layer + 1) % step == 0) for layer in range(layers)]
        if not any(freq):
            raise UserError(f"{where}: decoder_sparse_step={step} and mlp_only_layers leave no layer with experts")
    else:
        return 1
    return 1 if all(freq) else freq


def _groups(family: Family, config: dict[str, Any], where: str) -> dict[str, int]:
    """Of group-limited routing; none where all groups are taken."""
    if config.get("topk_method") == ONE_GROUP:
        return {}
    groups, chosen, topk = (integer(config, key, where) for key in ("n_group", "topk_group", "num_experts_per_tok"))
    if chosen >= groups:
        return {}
    limited = {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
    return limited if topk == family.group_best * chosen else limited | {"moe_router_group_best": family.group_best}


def write_experts(family: Family, config) -> dict[str, Any]:
    """What `read_experts` reads, of a `GPTModelConfig`."""
    if not family.experts:
        return {}
    sparse = layers_with_experts(config)
    if not any(sparse):
        return {"first_k_dense_replace": config.num_layers}
    given = {ours: getattr(config, ours) for ours in family.experts} | {"moe_ffn_hidden_size": config.expert_width}
    made = {family.experts[ours]: value for ours, value in given.items()}
    if "norm_topk_prob" in family.defaults:
        made["norm_topk_prob"] = config.moe_router_norm_topk_prob
    if "decoder_sparse_step" in family.defaults:
        made["mlp_only_layers"] = [layer for layer, has in enumerate(sparse) if not has]
    if "first_k_dense_replace" in family.defaults:
        made |= {
            "first_k_dense_replace": sparse.index(True),
            "n_shared_experts": (config.moe_shared_expert_intermediate_size or 0) // config.expert_width,
            "routed_scaling_factor": config.moe_router_topk_scaling_factor or 1.0,
            "n_group": config.moe_router_num_groups or 1,
            "topk_group": config.moe_router_group_topk or 1,
        }
    if "topk_method" in family.defaults:
        made["topk_method"] = ONE_GROUP if config.moe_router_num_groups is None else "group_limited_greedy"
    return made


def unpacked(found: dict[str, Stored], spelling: dict[str, str]) -> dict[str, Stored]:
    """Tensors with those that hold all experts of a layer as one for each, which is how the models are published.

    [e, rows, columns]: an expert's lie behind those of the one before; its gate's rows before those of the other half.
    """
    apart: dict[str, Stored] = {}
    for name, stored in found.items():
        packed = PACKED.fullmatch(name)
        if packed is None or len(stored.shape) != 3:
            apart[spelled(name, spelling) if ".mlp." in name else name] = stored
            continue
        experts, rows, columns = stored.shape
        parts = PARTS[packed[2]]
        shape = (rows // len(parts), columns)
        size = math.prod(shape) * DTYPES[stored.dtype].itemsize if stored.dtype in DTYPES else 0
        for place in range(experts * len(parts)):
            expert, part = divmod(place, len(parts))
            one = spelled(f"{packed[1]}{expert}.{parts[part]}.weight", spelling)
            apart[one] = dataclasses.replace(stored, shape=shape, start=stored.start + place * size)
    return apart
