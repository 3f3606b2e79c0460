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


def shard(name: str, full: Tensor, config: GPTModelConfig, rank: int) -> Tensor:
    """The part of a full tensor that tensor-parallel rank `rank` holds."""
    tp = config.tensor_model_parallel_size
    if "linear_qkv" in name:
        # Rows [q .. q, k, v] of one key/value head after the other; a rank holds whole heads, or of fewer heads than ranks an
        # equal stretch.
        return full.chunk(tp)[rank]
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
