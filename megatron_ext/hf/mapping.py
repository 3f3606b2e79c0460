"""Which Hugging Face tensors a parameter of ours is made of, and where: one table for reading and writing.

Dimensions: v vocabulary, h hidden size, f ffn hidden size, d head size, q = heads x d, k = key/value heads x d, o = heads x size
of a value head. Of latent attention: a compressed queries, c compressed keys and values, e those and the shared key, u keys and
values of all heads made of c. Of experts: n how many, x width of one, g of its two halves, s of the shared one. m heads.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from megatron_ext.hf.eyes import eye_tensors
from megatron_ext.hf.families import FAMILIES, family_of, spelled
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.expert_config import layers_with_experts
from megatron_ext.vision import VisionConfig

__all__ = [
    "EMBEDDING", "OUTPUT", "Architecture", "Entry", "TensorSlice", "entries", "exact_tensors", "find_entry", "hf_shapes",
]  # fmt: skip

OURS, THEIRS = "decoder.layers.{}.", "model.layers.{}."
EXPERT = "<e>"  # the number of an expert
EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


class Architecture(Protocol):
    """What of a `GPTModelConfig` gives the tensors their names and shapes."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    share_embeddings_and_output_weights: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    multi_latent_attention: bool
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    vision: VisionConfig | Mapping[str, Any] | None
    qk_layernorm_across_heads: bool
    num_moe_experts: int | None
    moe_ffn_hidden_size: int | None
    moe_layer_freq: int | list[int]
    moe_shared_expert_intermediate_size: int | None
    moe_shared_expert_gate: bool
    moe_router_enable_expert_bias: bool
    add_bias_linear: bool
    softmax_type: str


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a Hugging Face tensor and its place in a parameter of one tensor-parallel rank.

    Attributes:
        name: of the tensor.
        index: of the slice in the tensor.
        view: the parameter's shape in which the place is a rectangle.
        place: of the slice in that view.
        order: in which the view's dimensions lie in the tensor; None: as in the parameter. Then the place is all of it.
    """

    name: str
    index: tuple[slice, ...]
    view: tuple[int, ...]
    place: tuple[int | slice, ...]
    order: tuple[int, ...] | None = None

    def within(self, parameter: torch.Tensor) -> torch.Tensor:
        """Its place in the parameter, in the order of the tensor: a view."""
        place = parameter.view(self.view)[self.place]
        return place if self.order is None else place.permute(self.order)


@dataclass(frozen=True)
class Entry:
    """One kind of parameter.

    Attributes:
        ours: its names, of local layers and of Transformer Engine's fused ones; {} is the layer.
        theirs: the tensors that it holds, with their dimensions.
        cut: what a tensor-parallel rank holds: "whole" all of it; "vocabulary" its rows, with zeros behind the last;
            "columns"; "groups" for one key/value head after the other its rows of each tensor; "ranks" its rows of
            each tensor, one tensor after the other. Of fewer key/value heads than ranks a rank holds an equal stretch of
            the rows of "groups", wherever it begins and ends. Of tensors that hold all experts of a layer, inputs before outputs,
            an expert has "halves" of which the outputs take turns, cut by these, or what is "turned", cut by inputs.
        when: whether a model has it.
        copy: it repeats what another entry holds.
        shape: of the one tensor, where the model's sizes do not say it.
        layers: which have it: "all", those with "experts", or the "dense" ones without.
        expert: each expert has one, whose number stands for <e>; its ranks are those of experts.
        exact: it is fp32 in files of any type.
        packed: of families that hold all experts in one tensor, True, or apart, False; None: of all.
        number: which expert it is of.
    """

    ours: tuple[str, ...]
    theirs: dict[str, str]
    cut: str
    when: Callable[[Architecture], bool] = lambda config: True
    copy: bool = False
    shape: tuple[int, ...] | None = None
    layers: str = "all"
    expert: bool = False
    exact: bool = False
    packed: bool | None = None
    number: int | None = None

    def of_expert(self, number: int) -> Entry:
        """That of one expert, counted over all ranks."""
        theirs = {name.replace(EXPERT, str(number)): dims for name, dims in self.theirs.items()}
        return replace(self, number=number, theirs=theirs)

    def stands_in(self, layer: int, config: Architecture) -> bool:
        return self.layers == "all" or layers_with_experts(config)[layer] == (self.layers == "experts")

    def tensors(self, layer: int, config: Architecture) -> dict[str, tuple[int, ...]]:
        """Whole tensors by name, with their shapes."""
        if self.shape is not None:
            return dict.fromkeys(self.theirs, self.shape)
        latent = config.multi_latent_attention
        sizes = {
            "v": config.vocab_size,
            "h": config.hidden_size,
            "f": config.ffn_hidden_size,
            "d": config.kv_channels,
            "q": config.num_attention_heads * config.kv_channels,
            "k": config.num_query_groups * config.kv_channels,
            "o": config.num_attention_heads * (config.v_head_dim if latent else config.kv_channels),
            "a": config.q_lora_rank,
            "c": config.kv_lora_rank,
            "e": config.kv_lora_rank + config.qk_pos_emb_head_dim,
            "u": config.num_attention_heads * (config.qk_head_dim + config.v_head_dim),
            "n": config.num_moe_experts,
            "x": config.moe_ffn_hidden_size or config.ffn_hidden_size,
            "g": 2 * (config.moe_ffn_hidden_size or config.ffn_hidden_size),
            "s": config.moe_shared_expert_intermediate_size,
            "m": config.num_attention_heads,
            "1": 1,
        }
        return {name.format(layer): tuple(sizes[d] for d in dims.split()) for name, dims in self.theirs.items()}

    def slices(self, layer: int, config: GPTModelConfig, rank: int) -> Iterator[TensorSlice]:
        """What tensor-parallel rank `rank` holds; of an expert, that rank among those that share it."""
        tensors = self.tensors(layer, config)
        if self.packed:
            yield self._of_all(tensors, rank, config.expert_tensor_ranks)
            return
        tp = config.expert_tensor_ranks if self.expert else config.tensor_model_parallel_size
        total = config.num_query_groups if self.cut == "groups" else tp
        together = sum(shape[0] for shape in tensors.values()) // total  # rows of one group, or of one rank
        if total < tp:
            yield from self._stretch(tensors, total, together, (rank, tp))
            return
        first = 0
        for name, (size, *rest) in tensors.items():
            if self.cut == "whole":
                yield TensorSlice(name, (slice(0, size),), (size, *rest), ())
            elif self.cut == "columns":
                width = rest[0] // tp
                yield TensorSlice(name, (slice(0, size), slice(rank * width, (rank + 1) * width)), (size, width), ())
            elif self.cut == "vocabulary":
                rows = config.padded_vocab_size // tp
                start, end = (min(edge * rows, size) for edge in (rank, rank + 1))
                yield TensorSlice(name, (slice(start, end),), (rows, *rest), (slice(0, end - start),))
            else:
                here, height = total // tp, size // total
                index = slice(rank * here * height, (rank + 1) * here * height)
                yield TensorSlice(name, (index,), (here, together, *rest), (slice(None), slice(first, first + height)))
                first += height

    def _of_all(self, tensors: dict[str, tuple[int, ...]], rank: int, parts: int) -> TensorSlice:
        """A rank's part of one expert, out of a tensor of all."""
        ((name, (_, *shape)),) = tensors.items()
        inner = [slice(0, size) for size in shape]
        if self.cut != "whole":
            cut = -1 if self.cut == "halves" else 0  # outputs, or inputs
            shape[cut] //= parts
            inner[cut] = slice(rank * shape[cut], (rank + 1) * shape[cut])
        index = (slice(self.number, self.number + 1), *inner)
        if self.cut == "halves":
            *inputs, outputs = shape
            return TensorSlice(name, index, (2, outputs // 2, *inputs), (), tuple(range(len(inputs) + 2))[::-1])
        return TensorSlice(name, index, tuple(shape[::-1]), (), tuple(range(len(shape)))[::-1])

    @staticmethod
    def _stretch(
        tensors: dict[str, tuple[int, ...]], groups: int, together: int, part: tuple[int, int]
    ) -> Iterator[TensorSlice]:
        """What lies in one of equal parts, (number, of how many), of all groups' rows, in the order of `tensors` in each."""
        number, parts = part
        rows = groups * together // parts
        start = 0  # of this group's rows of this tensor among all
        for group in range(groups):
            for name, (size, *rest) in tensors.items():
                height = size // groups
                low, high = max(start, number * rows), min(start + height, (number + 1) * rows)
                if low < high:
                    index = slice(group * height + low - start, group * height + high - start)
                    place = slice(low - number * rows, high - number * rows)
                    yield TensorSlice(name, (index,), (rows, *rest), (place,))
                start += height

    def parameter_shape(self, hf_slice: TensorSlice) -> tuple[int, ...]:
        """Of the parameter that the slice is put into."""
        if hf_slice.order is not None and self.cut == "halves":
            return math.prod(hf_slice.view[:2]), *hf_slice.view[2:]
        if len(hf_slice.place) == 2:  # groups, and rows in each
            return hf_slice.view[0] * hf_slice.view[1], *hf_slice.view[2:]
        return hf_slice.view


def _experts(ours: str | tuple[str, ...], theirs: dict[str, str], cut: str, **options) -> Entry:
    """Of layers with experts."""
    return _layer(ours, {f"mlp.{name}": dims for name, dims in theirs.items()}, cut, layers="experts", **options)


def _layer(ours: str | tuple[str, ...], theirs: dict[str, str], cut: str, **options) -> Entry:
    names = (ours,) if isinstance(ours, str) else ours
    return Entry(tuple(OURS + n for n in names), {THEIRS + name: dims for name, dims in theirs.items()}, cut, **options)


def _compresses_queries(config: Architecture) -> bool:
    return config.multi_latent_attention and config.q_lora_rank is not None


TABLE = (
    Entry(("embedding.word_embeddings.weight",), {EMBEDDING: "v h"}, "vocabulary"),
    _layer(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        {"input_layernorm.weight": "h"}, "whole",
    ),
    _layer(
        "self_attention.linear_qkv.weight",
        {"self_attn.q_proj.weight": "q h", "self_attn.k_proj.weight": "k h", "self_attn.v_proj.weight": "k h"}, "groups",
        when=lambda config: not config.multi_latent_attention,
    ),
    _layer("self_attention.linear_q_proj.weight", {"self_attn.q_proj.weight": "q h"}, "ranks",
           when=lambda config: config.multi_latent_attention and config.q_lora_rank is None),
    _layer("self_attention.linear_q_down_proj.weight", {"self_attn.q_a_proj.weight": "a h"}, "ranks", when=_compresses_queries),
    _layer("self_attention.q_layernorm.weight", {"self_attn.q_a_layernorm.weight": "a"}, "whole", when=_compresses_queries),
    _layer("self_attention.linear_q_up_proj.weight", {"self_attn.q_b_proj.weight": "q a"}, "ranks", when=_compresses_queries),
    _layer("self_attention.linear_kv_down_proj.weight", {"self_attn.kv_a_proj_with_mqa.weight": "e h"}, "ranks",
           when=lambda config: config.multi_latent_attention),
    _layer("self_attention.kv_layernorm.weight", {"self_attn.kv_a_layernorm.weight": "c"}, "whole",
           when=lambda config: config.multi_latent_attention),
    _layer("self_attention.linear_kv_up_proj.weight", {"self_attn.kv_b_proj.weight": "u c"}, "ranks",
           when=lambda config: config.multi_latent_attention),
    _layer(
        "self_attention.linear_qkv.bias",
        {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "k", "self_attn.v_proj.bias": "k"}, "groups",
        when=lambda config: config.add_qkv_bias,
    ),
    _layer("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "d"}, "whole",
           when=lambda config: config.qk_layernorm and not config.qk_layernorm_across_heads),
    _layer("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "d"}, "whole",
           when=lambda config: config.qk_layernorm and not config.qk_layernorm_across_heads),
    _layer("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "q"}, "ranks",
           when=lambda config: config.qk_layernorm_across_heads),
    _layer("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "k"}, "ranks",
           when=lambda config: config.qk_layernorm_across_heads),
    _layer("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "h o"}, "columns"),
    _layer("self_attention.linear_proj.bias", {"self_attn.o_proj.bias": "h"}, "whole",
           when=lambda config: config.add_bias_linear),
    _layer("self_attention.core_attention.softmax_offset", {"self_attn.sinks": "m"}, "ranks",
           when=lambda config: config.softmax_type == "learnable"),
    _layer(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        {"post_attention_layernorm.weight": "h"}, "whole",
    ),
    _layer("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "f h", "mlp.up_proj.weight": "f h"}, "ranks", layers="dense"),
    _layer("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "h f"}, "columns", layers="dense"),
    _experts("mlp.router.weight", {"gate.weight": "n h"}, "whole"),
    _experts("mlp.router.bias", {"gate.bias": "n"}, "whole", when=lambda config: config.add_bias_linear),
    _experts("mlp.router.expert_bias", {"gate.e_score_correction_bias": "n"}, "whole", exact=True,
             when=lambda config: config.moe_router_enable_expert_bias),
    _experts(
        (f"mlp.experts.local_experts.{EXPERT}.linear_fc1.weight", f"mlp.experts.linear_fc1.weight{EXPERT}"),
        {f"experts.{EXPERT}.gate_proj.weight": "x h", f"experts.{EXPERT}.up_proj.weight": "x h"}, "ranks", expert=True,
        packed=False,
    ),
    _experts(
        (f"mlp.experts.local_experts.{EXPERT}.linear_fc2.weight", f"mlp.experts.linear_fc2.weight{EXPERT}"),
        {f"experts.{EXPERT}.down_proj.weight": "h x"}, "columns", expert=True, packed=False,
    ),
    *(
        _experts(
            (f"mlp.experts.local_experts.{EXPERT}.linear_{ours}", f"mlp.experts.linear_{ours}{EXPERT}"),
            {f"experts.{theirs}": dims}, cut, expert=True, packed=True,
        )
        for ours, theirs, dims, cut in (
            ("fc1.weight", "gate_up_proj", "n h g", "halves"), ("fc1.bias", "gate_up_proj_bias", "n g", "halves"),
            ("fc2.weight", "down_proj", "n x h", "turned"), ("fc2.bias", "down_proj_bias", "n h", "whole"),
        )
    ),
    _experts("mlp.shared_experts.linear_fc1.weight",
             {"shared_expert.gate_proj.weight": "s h", "shared_expert.up_proj.weight": "s h"}, "ranks",
             when=lambda config: config.moe_shared_expert_intermediate_size is not None),
    _experts("mlp.shared_experts.linear_fc2.weight", {"shared_expert.down_proj.weight": "h s"}, "columns",
             when=lambda config: config.moe_shared_expert_intermediate_size is not None),
    _experts("mlp.shared_experts.gate_weight", {"shared_expert_gate.weight": "1 h"}, "whole",
             when=lambda config: config.moe_shared_expert_gate),
    Entry(("decoder.final_layernorm.weight",), {"model.norm.weight": "h"}, "whole"),
    Entry(("output_layer.weight",), {OUTPUT: "v h"}, "vocabulary",
          when=lambda config: not config.share_embeddings_and_output_weights),
    # The last stage of a pipeline has its own copy of a tied embedding.
    Entry(("output_layer.weight",), {EMBEDDING: "v h"}, "vocabulary",
          when=lambda config: config.share_embeddings_and_output_weights, copy=True),
)  # fmt: skip


def _of_model(config: Architecture) -> list[Entry]:
    """The table as such a model has it, in the names of its family."""
    family = None if config.num_moe_experts is None else FAMILIES[family_of(config)]
    spelling = {} if family is None else family.spelling
    return [
        replace(entry, theirs={spelled(name, spelling): dims for name, dims in entry.theirs.items()})
        if entry.layers == "experts"
        else entry
        for entry in TABLE
        if entry.when(config) and (family is None or entry.packed in (None, family.packed))
    ]


def entries(config: GPTModelConfig) -> dict[str, Entry]:
    """What such a model has, by each of its names."""
    here = [*_of_model(config), *_eyes(config)]
    return {name: entry for entry in here for name in entry.ours}


def _eyes(config: Architecture) -> list[Entry]:
    """Of the tower and the connector behind it."""
    found = eye_tensors(config.vision, config.hidden_size)
    return [Entry((ours,), {theirs: ""}, "whole", shape=shape) for ours, theirs, shape in found]


def hf_shapes(config: Architecture, untied: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model, in the model's order.

    Args:
        untied: a model of tied embeddings has an output layer of its own.
    """
    found: dict[str, tuple[int, ...]] = {}
    here = (entry for entry in _of_model(config) if not entry.copy)
    for layered, some in itertools.groupby(here, lambda entry: entry.ours[0].startswith(OURS)):
        alike = list(some)
        for layer in range(config.num_layers if layered else 1):
            for entry in alike:
                if entry.stands_in(layer, config):
                    each = map(entry.of_expert, range(config.num_moe_experts)) if entry.expert else (entry,)
                    for one in each:
                        found |= one.tensors(layer, config)
    found |= {name: shape for entry in _eyes(config) for name, shape in entry.tensors(0, config).items()}
    return found | ({OUTPUT: found[EMBEDDING]} if untied else {})


def exact_tensors(config: Architecture) -> set[str]:
    """Names of the tensors that are fp32 in files of any type."""
    exact = [entry for entry in _of_model(config) if entry.exact]
    return {
        name
        for entry in exact
        for layer in range(config.num_layers)
        if entry.stands_in(layer, config)
        for name in entry.tensors(layer, config)
    }


def find_entry(known: dict[str, Entry], name: str, first_expert: int = 0) -> Entry | None:
    """The entry of a parameter; of `entries` by a name with the layer left out.

    Args:
        first_expert: the number of the rank's first expert among all.
    """
    found = re.fullmatch(r"(.*\.mlp\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d+)(.*)", name)
    if found is None:
        return known.get(name)
    entry = known.get(found[1] + EXPERT + found[3])
    return entry and entry.of_expert(first_expert + int(found[2]))
