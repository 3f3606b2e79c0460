"""Every parameter of a pipeline stage on one tensor-parallel rank, without building it.

Names, shapes and order are those of `build_gpt`: Megatron lays its buffers out in that order.

Symbols: h hidden size, n query and m key/value heads, d head size, f width of the MLP, x of an expert, v padded vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.freezing import CONNECTOR, TOWER, is_frozen
from megatron_ext.vision.connectors import build_connector
from megatron_ext.vision.kinds import build_tower

__all__ = [
    "ParameterTensor", "active_parameters", "adds_gradients", "layers_of_stage", "model_parameters", "stage_parameters",
    "stand_in_gradients", "trained_of_stage", "weights_train",
]  # fmt: skip

LINEAR = re.compile(r"decoder\.layers\..*\.linear_\w+\.weight$")


@dataclass(frozen=True)
class ParameterTensor:
    """One parameter as this rank holds it.

    Attributes:
        sharded: cut over the tensor-parallel ranks; else each of them has all of it.
        shared_embedding: the word embedding of the first or last of several stages that share it.
        layer: the number of its layer in the whole model, from 0; None outside of layers.
        piece: of the stage's.
        adapter: of an adapter, not of the model that it stands on.
        expert: of an expert, of which this rank has a share of all, and of each a share of the ranks that it is cut over.
    """

    name: str
    shape: tuple[int, ...]
    sharded: bool = False
    shared_embedding: bool = False
    layer: int | None = None
    piece: int = 0
    adapter: bool = False
    expert: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def sees(self) -> bool:
        """Whether it is part of the tower or the connector."""
        return self.name.lstrip("0123456789.").startswith((TOWER, CONNECTOR))


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
        found += _eyes(config)
    return found


def trained_of_stage(config: GPTModelConfig, stage: int, blocks: int) -> list[ParameterTensor]:
    """Those of a stage that train: all that are not frozen, or those of so many blocks, of which all have as many; of a model
    with adapters these alone."""
    layers = layers_of_stage(config, stage)[:blocks]
    found = [p for p in stage_parameters(config, stage) if not blocks or p.layer in layers]
    if config.peft is not None:
        return [p for p in found if p.adapter]
    return [p for p in found if blocks or not is_frozen(p.name.lstrip("0123456789."), config)]


def weights_train(config: GPTModelConfig) -> bool:
    """Whether the language model's own weights get gradients: not behind adapters, nor where only its eyes train."""
    return config.peft is None and not config.freeze_language_model


def adds_gradients(config: GPTModelConfig) -> bool:
    """Whether the kernel that computes a linear's weight gradient adds it to the buffer, and nothing is there before but
    `stand_in_gradients`. Megatron's own linears make a tensor for each gradient all the same, which nobody writes."""
    return config.gradient_accumulation_fusion and config.transformer_impl != "local"


def stand_in_gradients(config: GPTModelConfig, stage: int) -> int:
    """Numbers of what autograd is handed in place of gradients that have been added already: Transformer Engine keeps one tensor
    for each shape of a linear's weight. The vocabulary's gradient is ours, and computed in the usual way."""
    if not adds_gradients(config):
        return 0
    trained = trained_of_stage(config, stage, blocks=0)
    return sum(math.prod(shape) for shape in {p.shape for p in trained if LINEAR.search(p.name)})


def _layer(config: GPTModelConfig, prefix: str, layer: int) -> list[ParameterTensor]:
    h, tp, d = config.hidden_size, config.tensor_model_parallel_size, config.kv_channels
    heads = config.num_attention_heads // tp
    qkv = (config.num_attention_heads + 2 * config.num_query_groups) * d // tp
    f = config.ffn_hidden_size // tp
    latent = config.multi_latent_attention
    rows = [
        ("input_layernorm.weight", (h,), False, True),
        ("self_attention.core_attention.softmax_offset", (heads,), True, config.softmax_type == "learnable"),
        ("self_attention.linear_proj.weight", (h, heads * config.value_channels), True, True),
        ("self_attention.linear_proj.bias", (h,), False, config.add_bias_linear),
        *(_latent(config) if latent else ()),
        ("self_attention.linear_qkv.weight", (qkv, h), True, not latent),
        ("self_attention.linear_qkv.bias", (qkv,), True, config.add_qkv_bias),
        *_query_key_norms(config),
        ("pre_mlp_layernorm.weight", (h,), False, True),
    ]
    has_experts = config.layers_with_experts[layer]
    if not has_experts:
        rows += [("mlp.linear_fc1.weight", (2 * f, h), True, True), ("mlp.linear_fc2.weight", (h, f), True, True)]
    there = [ParameterTensor(prefix + name, shape, sharded, layer=layer) for name, shape, sharded, has in rows if has]
    if has_experts:
        there += _experts(config, f"{prefix}mlp.", layer)
    if config.peft is None:
        return there
    found = []
    for number, parameter in enumerate(there):
        linear = parameter.name.rpartition(".")[0]
        found.append(parameter)
        if number + 1 == len(there) or not there[number + 1].name.startswith(f"{linear}."):  # behind its bias
            found += _adapter(config, linear, layer)
    return found


def _adapter(config: GPTModelConfig, linear: str, layer: int) -> list[ParameterTensor]:
    """Of a linear, named with what is around it; none where it has no adapter."""
    around, _, name = linear.rpartition(".")
    expert = ".local_experts." in around
    place = "mlp.experts" if expert else next((p for p in config.linears if around.endswith(f".{p}")), None)
    if place is None or name not in config.linears[place]:
        return []
    tp = config.expert_tensor_ranks if expert else config.tensor_model_parallel_size
    branches, dim, shape = config.peft.branches(name), config.peft.dim, config.linears[place][name]
    column = shape.column
    inputs = shape.inputs if column else shape.inputs // tp
    shapes = [(f"a_{branch}", (dim, inputs), not column) for branch in branches]
    for parts in branches.values():
        shapes += [(f"b_{part}", (shape.rows[part] // (tp if column else 1), dim), column) for part in parts]
    return [
        ParameterTensor(f"{linear}.lora.{n}", shape, cut or expert, layer=layer, adapter=True, expert=expert)
        for n, shape, cut in shapes
    ]


def _latent(config: GPTModelConfig) -> list[tuple[str, tuple[int, ...], bool, bool]]:
    """Of multi-latent attention: (name, shape, whether sharded, whether there)."""
    h, tp, rank, r = config.hidden_size, config.tensor_model_parallel_size, config.q_lora_rank, config.kv_lora_rank
    heads, there = config.num_attention_heads // tp, rank is not None
    queries, name = heads * config.kv_channels, "self_attention."
    rank = rank or 0
    return [
        (name + "linear_q_proj.weight", (queries, h), True, not there),
        (name + "linear_q_down_proj.weight", (rank // tp, h), True, there),
        (name + "linear_q_up_proj.weight", (queries, rank), True, there),
        (name + "linear_kv_down_proj.weight", ((r + config.qk_pos_emb_head_dim) // tp, h), True, True),
        (name + "linear_kv_up_proj.weight", (heads * (config.qk_head_dim + config.v_head_dim), r), True, True),
        (name + "q_layernorm.weight", (rank,), False, there),
        (name + "kv_layernorm.weight", (r,), False, True),
    ]


def _query_key_norms(config: GPTModelConfig) -> list[tuple[str, tuple[int, ...], bool, bool]]:
    across, tp = config.qk_layernorm_across_heads, config.tensor_model_parallel_size
    found = []
    for name, heads in (("q", config.num_attention_heads), ("k", config.num_query_groups)):
        width = config.kv_channels * (heads // tp if across else 1)
        found.append((f"self_attention.{name}_layernorm.weight", (width,), across, config.qk_layernorm))
    return found


def _experts(config: GPTModelConfig, prefix: str, layer: int) -> list[ParameterTensor]:
    h, shared = config.hidden_size, config.moe_shared_expert_intermediate_size
    x = config.expert_width // config.expert_tensor_ranks
    biased = config.add_bias_linear
    found = [ParameterTensor(f"{prefix}router.weight", (config.num_moe_experts, h), layer=layer)]
    if biased:
        found.append(ParameterTensor(f"{prefix}router.bias", (config.num_moe_experts,), layer=layer))
    tensors = [
        ("linear_fc1.weight", (2 * x, h), True), ("linear_fc1.bias", (2 * x,), True), ("linear_fc2.weight", (h, x), True),
        ("linear_fc2.bias", (h,), False),
    ]  # fmt: skip
    for number in range(config.num_moe_experts // config.expert_model_parallel_size):
        for name, shape, sharded in tensors:
            if biased or not name.endswith("bias"):
                name = f"{prefix}experts.local_experts.{number}.{name}"
                found.append(ParameterTensor(name, shape, sharded, layer=layer, expert=True))
    if shared is not None:
        s, name = shared // config.tensor_model_parallel_size, f"{prefix}shared_experts."
        if config.moe_shared_expert_gate:
            found.append(ParameterTensor(f"{name}gate_weight", (1, h), layer=layer))
        found.append(ParameterTensor(f"{name}linear_fc1.weight", (2 * s, h), True, layer=layer))
        found.append(ParameterTensor(f"{name}linear_fc2.weight", (h, s), True, layer=layer))
    return found


def _eyes(config: GPTModelConfig) -> list[ParameterTensor]:
    """Of the connector and the tower, as they are built, on a device that takes no memory."""
    vision, device = config.vision, torch.device("meta")
    with device:
        parts = {CONNECTOR: build_connector(vision, config.hidden_size, config.init_method_std)}
    if vision.has_tower:
        parts[f"{TOWER}model."] = build_tower(vision.tower_config, device)
    return [
        ParameterTensor(prefix + name, tuple(parameter.shape))
        for prefix, module in parts.items()
        for name, parameter in module.named_parameters()
    ]


def model_parameters(config: GPTModelConfig) -> int:
    """Parameters of the whole model, each counted once: as a model card has it, with the padded vocabulary, without adapters."""
    return sum(_counted(config, 1.0))


def active_parameters(config: GPTModelConfig) -> int:
    """Those that a token goes through: of experts the chosen ones alone, and all of the embedding."""
    return sum(_counted(config, config.moe_router_topk / (config.num_moe_experts or config.moe_router_topk)))


def _counted(config: GPTModelConfig, of_experts: float) -> Iterator[int]:
    for stage in range(config.pipeline_model_parallel_size):
        for p in stage_parameters(config, stage):
            if (p.shared_embedding and stage) or p.adapter:
                continue
            if p.expert:
                parts = config.expert_tensor_ranks if p.sharded else 1
                yield round(p.numel * config.expert_model_parallel_size * parts * of_experts)
            else:
                yield p.numel * (config.tensor_model_parallel_size if p.sharded else 1)
