"""A full model's tensors cut for one rank, by hand: the layouts written down, independent of Megatron's own code."""

from __future__ import annotations

import re

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.models import GPTModelConfig

__all__ = ["full_name", "load_full", "ranks_here", "shard"]


def full_name(name: str, config: GPTModelConfig, stage: int) -> str:
    """The parameter's name in the full model: layers counted from the first stage, a tied output by its embedding."""
    if name == "output_layer.weight" and config.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    per_stage = config.num_layers // config.pipeline_model_parallel_size
    return re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + stage * per_stage}.", name)


def shard(name: str, full: Tensor, config: GPTModelConfig, rank: int) -> Tensor:
    """The part of a full tensor that tensor-parallel rank `rank` holds."""
    tp = config.tensor_model_parallel_size
    if "linear_qkv" in name:
        # Rows [q .. q, k, v] of one key/value head after the other; a rank holds whole heads.
        heads = full.view(config.num_query_groups, -1, *full.shape[1:])
        return heads.chunk(tp)[rank].flatten(0, 1)
    if "linear_fc1" in name:
        # [gate; up]: a rank holds the same rows of both.
        return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])
    if "linear_proj" in name or "linear_fc2" in name:
        return full.chunk(tp, dim=1)[rank]
    if "word_embeddings" in name or "output_layer" in name:
        return full.chunk(tp)[rank]
    return full


def ranks_here() -> tuple[int, int]:
    """(tensor-parallel rank, pipeline stage) of this process."""
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()


def load_full(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Give this rank's model its shards of the full model's weights."""
    config: GPTModelConfig = model.model_config
    rank, stage = ranks_here()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shard(name, weights[full_name(name, config, stage)], config, rank))
