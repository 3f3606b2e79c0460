"""A full model's tensors cut for one rank, by hand: the layouts written down, independent of Megatron's own code."""

from __future__ import annotations

import re

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.models import GPTModelConfig
from tests.engine_cases import gradient_floor, relative_error

__all__ = ["assert_one_rank", "expert_ranks_here", "full_name", "load_full", "ranks_here", "shard"]


def full_name(name: str, config: GPTModelConfig, stage: int, expert: int = 0) -> str:
    """The parameter's name in the full model: layers counted from the first stage, experts from the first rank that has some
    (`expert` is this one's number), a tied output by its embedding."""
    if config.num_moe_experts:
        before = expert * (config.num_moe_experts // config.expert_model_parallel_size)
        name = re.sub(r"local_experts\.(\d+)", lambda m: f"local_experts.{int(m[1]) + before}", name)
    pieces = config.virtual_pipeline_model_parallel_size
    piece, name = name.split(".", 1) if pieces else (0, name)
    if name == "output_layer.weight" and config.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    stages, layers = config.pipeline_model_parallel_size, config.num_layers
    if pieces:  # stage 0, 1, .. of the first part of the model, stage 0, 1, .. of the second
        first = (int(piece) * stages + stage) * (layers // (stages * pieces))
    elif last := config.num_layers_in_last_pipeline_stage:  # of two
        first = stage * (layers - last)
    else:
        first = stage * (layers // stages)
    return re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + first}.", name)


def shard(name: str, full: Tensor, config: GPTModelConfig, rank: int, expert_rank: int = 0) -> Tensor:
    """The part of a full tensor that tensor-parallel rank `rank` holds; of an expert, `expert_rank` of those that share it."""
    tp = config.tensor_model_parallel_size
    if name.startswith(("vision_tower.", "media_projector.")):
        return full
    if "local_experts" in name:
        tp, rank = config.expert_tensor_parallel_size or tp, expert_rank
    if config.qk_layernorm_across_heads and ("q_layernorm" in name or "k_layernorm" in name):
        return full.chunk(tp)[rank]
    if "linear_qkv" in name:
        # Rows [q .. q, k, v] of one key/value head after the other; a rank holds whole heads, or of fewer heads than ranks an
        # equal stretch.
        return full.chunk(tp)[rank]
    if "linear_fc1" in name:
        # [gate; up]: a rank holds the same rows of both.
        return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])
    if "softmax_offset" in name or "linear_q_" in name or "linear_kv_" in name:
        return full.chunk(tp)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return full.chunk(tp, dim=1)[rank]
    if "word_embeddings" in name or "output_layer" in name:
        return full.chunk(tp)[rank]
    return full


def assert_one_rank(ranks: list[dict], number: int, config: GPTModelConfig, single: dict, bound: float) -> None:
    """Scores, every gradient and greedy tokens of a case, on all ranks, are those of one rank.

    Args:
        ranks: what each says: its `rank` and `stage`, and of each of `cases` `scores`, `gradients` and `greedy`.
    """
    floor, met = gradient_floor(single["gradients"]), set()
    for place in ranks:
        result = place["cases"][number]
        assert relative_error(result["scores"], single["scores"]) <= bound
        assert result["greedy"] == single["greedy"]
        for parameter, found in result["gradients"].items():
            whole = full_name(parameter, config, place["stage"])
            met.add(whole)
            truth = shard(parameter, single["gradients"][whole], config, place["rank"])
            assert relative_error(found, truth, floor) <= bound, (place["rank"], parameter)
    assert met == set(single["gradients"])


def ranks_here() -> tuple[int, int]:
    """(tensor-parallel rank, pipeline stage) of this process."""
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()


def expert_ranks_here() -> tuple[int, int]:
    """(which experts, which part of each) of this process."""
    return parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank()


def load_full(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Give this rank's model its shards of the full model's weights, and of buffers, experts' biases, what is among them."""
    config: GPTModelConfig = model.model_config
    (rank, stage), (expert, expert_rank) = ranks_here(), expert_ranks_here()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = weights[full_name(name, config, stage, expert)]
            parameter.copy_(shard(name, whole, config, rank, expert_rank))
        for name, buffer in model.named_buffers():
            if (whole := full_name(name, config, stage)) in weights:
                buffer.copy_(weights[whole])
