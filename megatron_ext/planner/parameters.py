"""Every parameter of a pipeline stage on one tensor-parallel rank, without building it.

Names, shapes and order are those of `build_gpt`: Megatron lays its buffers out in that order.

Symbols: h hidden size, n query and m key/value heads, d head size, f width of the MLP, v padded vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_ext.models.config import GPTModelConfig

__all__ = ["ParameterTensor", "layers_of_stage", "model_parameters", "stage_parameters", "trained_of_stage"]


@dataclass(frozen=True)
class ParameterTensor:
    """One parameter as this rank holds it.

    Attributes:
        sharded: cut over the tensor-parallel ranks; else each of them has all of it.
        shared_embedding: the word embedding of the first or last of several stages that share it.
        layer: the number of its layer in the whole model, from 0; None outside of layers.
        piece: of the stage's.
    """

    name: str
    shape: tuple[int, ...]
    sharded: bool = False
    shared_embedding: bool = False
    layer: int | None = None
    piece: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def layers_of_stage(config: GPTModelConfig, stage: int) -> list[int]:
    """Numbers of its layers, from 0, of all its pieces."""
    return [layer for piece in config.pipeline_split.stage(stage) for layer in piece]


def stage_parameters(config: GPTModelConfig, stage: int) -> list[ParameterTensor]:
    """All parameters of a stage in `named_parameters` order; layers are numbered within the stage, or its piece, as there."""
    split = config.pipeline_split
    if split.pieces == 1:
        return _piece(config, stage, 0)
    return [
        dataclasses.replace(parameter, name=f"{piece}.{parameter.name}", piece=piece)
        for piece in range(split.pieces)
        for parameter in _piece(config, stage, piece)
    ]


def _piece(config: GPTModelConfig, stage: int, piece: int) -> list[ParameterTensor]:
    h, split = config.hidden_size, config.pipeline_split
    first, last = stage == piece == 0, (stage, piece) == (split.stages - 1, split.pieces - 1)
    tied = config.share_embeddings_and_output_weights
    vocabulary = (config.padded_vocab_size // config.tensor_model_parallel_size, h)
    found = []
    if first:
        shared = tied and split.stages > 1
        found.append(ParameterTensor("embedding.word_embeddings.weight", vocabulary, True, shared))
    for number, layer in enumerate(split.stage(stage)[piece]):
        found += _layer(config, f"decoder.layers.{number}.", layer)
    if last:
        found.append(ParameterTensor("decoder.final_layernorm.weight", (h,)))
        if not (tied and first):
            found.append(ParameterTensor("output_layer.weight", vocabulary, True, tied))
    if first and config.vision is not None:
        found += _media_projector(config.vision.feature_size, h)
    return found


def trained_of_stage(config: GPTModelConfig, stage: int, block: bool) -> list[ParameterTensor]:
    """Those of a stage that train: all, or one block's, of which all have as many."""
    layer = layers_of_stage(config, stage)[0]
    return [p for p in stage_parameters(config, stage) if not block or p.layer == layer]


def _layer(config: GPTModelConfig, prefix: str, layer: int) -> list[ParameterTensor]:
    h, tp, d = config.hidden_size, config.tensor_model_parallel_size, config.kv_channels
    heads = config.num_attention_heads // tp
    qkv = (config.num_attention_heads + 2 * config.num_query_groups) * d // tp
    f = config.ffn_hidden_size // tp
    rows = [
        ("input_layernorm.weight", (h,), False, True),
        ("self_attention.linear_proj.weight", (h, heads * d), True, True),
        ("self_attention.linear_qkv.weight", (qkv, h), True, True),
        ("self_attention.linear_qkv.bias", (qkv,), True, config.add_qkv_bias),
        ("self_attention.q_layernorm.weight", (d,), False, config.qk_layernorm),
        ("self_attention.k_layernorm.weight", (d,), False, config.qk_layernorm),
        ("pre_mlp_layernorm.weight", (h,), False, True),
        ("mlp.linear_fc1.weight", (2 * f, h), True, True),
        ("mlp.linear_fc2.weight", (h, f), True, True),
    ]
    return [
        ParameterTensor(prefix + name, shape, sharded, layer=layer) for name, shape, sharded, there in rows if there
    ]


def _media_projector(features: int, h: int) -> list[ParameterTensor]:
    shapes = {
        "norm.weight": (features,),
        "norm.bias": (features,),
        "patch.weight": (h, features),
        "patch.bias": (h,),
        "out.weight": (h, h),
        "out.bias": (h,),
    }
    return [ParameterTensor(f"media_projector.{name}", shape) for name, shape in shapes.items()]


def model_parameters(config: GPTModelConfig) -> int:
    """Parameters of the whole model, each counted once: what a model card tells, with the padded vocabulary."""
    total = 0
    for stage in range(config.pipeline_model_parallel_size):
        for p in stage_parameters(config, stage):
            if p.shared_embedding and stage:
                continue
            total += p.numel * (config.tensor_model_parallel_size if p.sharded else 1)
    return total
