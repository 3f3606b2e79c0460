"""Which Hugging Face tensors a parameter of ours is made of, and where: one table for reading and writing.

Dimensions: v vocabulary, h hidden size, f ffn hidden size, d head size, q = heads x d, k = key/value heads x d.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.pieces import pieces_of

__all__ = [
    "EMBEDDING", "OUTPUT", "Architecture", "Entry", "TensorSlice", "entries", "held_slices", "hf_shapes", "placed_parameters",
]  # fmt: skip

OURS, THEIRS = "decoder.layers.{}.", "model.layers.{}."
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


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a Hugging Face tensor and its place in a parameter of one tensor-parallel rank.

    Attributes:
        name: of the tensor.
        index: of the slice in the tensor.
        view: the parameter's shape in which the place is a rectangle.
        place: of the slice in that view.
    """

    name: str
    index: tuple[slice, ...]
    view: tuple[int, ...]
    place: tuple[int | slice, ...]


@dataclass(frozen=True)
class Entry:
    """One kind of parameter.

    Attributes:
        ours: its names, of local layers and of Transformer Engine's fused ones; {} is the layer.
        theirs: the tensors that it holds, with their dimensions.
        cut: what a tensor-parallel rank holds: "whole" all of it; "vocabulary" its rows, with zeros behind the last;
            "columns"; "groups" for one key/value head after the other its rows of each tensor; "ranks" its rows of
            each tensor, one tensor after the other. Of fewer key/value heads than ranks a rank holds an equal stretch of
            the rows of "groups", wherever it begins and ends.
        when: whether a model has it.
        copy: it repeats what another entry holds.
    """

    ours: tuple[str, ...]
    theirs: dict[str, str]
    cut: str
    when: Callable[[Architecture], bool] = lambda config: True
    copy: bool = False

    def tensors(self, layer: int, config: Architecture) -> dict[str, tuple[int, ...]]:
        """Whole tensors by name, with their shapes."""
        sizes = {
            "v": config.vocab_size,
            "h": config.hidden_size,
            "f": config.ffn_hidden_size,
            "d": config.kv_channels,
            "q": config.num_attention_heads * config.kv_channels,
            "k": config.num_query_groups * config.kv_channels,
        }
        return {name.format(layer): tuple(sizes[d] for d in dims.split()) for name, dims in self.theirs.items()}

    def slices(self, layer: int, config: GPTModelConfig, rank: int) -> Iterator[TensorSlice]:
        """What tensor-parallel rank `rank` holds."""
        tensors, tp = self.tensors(layer, config), config.tensor_model_parallel_size
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
        if len(hf_slice.place) == 2:  # groups, and rows in each
            return hf_slice.view[0] * hf_slice.view[1], *hf_slice.view[2:]
        return hf_slice.view


def _layer(ours: str | tuple[str, ...], theirs: dict[str, str], cut: str, **options) -> Entry:
    names = (ours,) if isinstance(ours, str) else ours
    return Entry(tuple(OURS + n for n in names), {THEIRS + name: dims for name, dims in theirs.items()}, cut, **options)


TABLE = (
    Entry(("embedding.word_embeddings.weight",), {EMBEDDING: "v h"}, "vocabulary"),
    _layer(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        {"input_layernorm.weight": "h"}, "whole",
    ),
    _layer(
        "self_attention.linear_qkv.weight",
        {"self_attn.q_proj.weight": "q h", "self_attn.k_proj.weight": "k h", "self_attn.v_proj.weight": "k h"}, "groups",
    ),
    _layer(
        "self_attention.linear_qkv.bias",
        {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "k", "self_attn.v_proj.bias": "k"}, "groups",
        when=lambda config: config.add_qkv_bias,
    ),
    _layer("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "d"}, "whole",
           when=lambda config: config.qk_layernorm),
    _layer("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "d"}, "whole",
           when=lambda config: config.qk_layernorm),
    _layer("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "h q"}, "columns"),
    _layer(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        {"post_attention_layernorm.weight": "h"}, "whole",
    ),
    _layer("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "f h", "mlp.up_proj.weight": "f h"}, "ranks"),
    _layer("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "h f"}, "columns"),
    Entry(("decoder.final_layernorm.weight",), {"model.norm.weight": "h"}, "whole"),
    Entry(("output_layer.weight",), {OUTPUT: "v h"}, "vocabulary",
          when=lambda config: not config.share_embeddings_and_output_weights),
    # The last stage of a pipeline has its own copy of a tied embedding.
    Entry(("output_layer.weight",), {EMBEDDING: "v h"}, "vocabulary",
          when=lambda config: config.share_embeddings_and_output_weights, copy=True),
)  # fmt: skip


def entries(config: GPTModelConfig) -> dict[str, Entry]:
    """What such a model has, by each of its names."""
    return {name: entry for entry in TABLE if entry.when(config) for name in entry.ours}


def hf_shapes(config: Architecture, untied: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model, in the model's order.

    Args:
        untied: a model of tied embeddings has an output layer of its own.
    """
    found: dict[str, tuple[int, ...]] = {}
    here = (entry for entry in TABLE if entry.when(config) and not entry.copy)
    for layered, some in itertools.groupby(here, lambda entry: entry.ours[0].startswith(OURS)):
        alike = list(some)
        for layer in range(config.num_layers if layered else 1):
            for entry in alike:
                found |= entry.tensors(layer, config)
    return found | ({OUTPUT: found[EMBEDDING]} if untied else {})


def placed_parameters(model: PrefixGroupedGPT) -> Iterator[tuple[str, torch.nn.Parameter, Entry | None, int]]:
    """(name, parameter, its entry, layer counted from the first stage) of this rank; no entry for what Hugging Face's
    model has not, such as a projector of media."""
    known = entries(model.model_config)
    for piece in pieces_of(model):
        for name, parameter in piece.named_parameters():
            layer, pattern = 0, name
            if found := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
                layer, pattern = piece.decoder.layers[int(found[1])].layer_number - 1, OURS + found[2]
            yield name, parameter, known.get(pattern), layer


def held_slices(model: PrefixGroupedGPT, untied: bool = False) -> Iterator[tuple[str, tuple[slice, ...], torch.Tensor]]:
    """This rank's part of the Hugging Face model, in the order of its parameters: (tensor, index in it, what is there). Of a
    data-parallel replica's parts each number comes once.

    What is there may have its rows in equal groups, [groups, rows of a group, ...].

    Args:
        untied: see `hf_shapes`.
    """
    config, rank = model.model_config, model.pg_collection.tp.rank()
    twice = untied and config.share_embeddings_and_output_weights
    for name, parameter, entry, layer in placed_parameters(model):
        assert entry is not None, name  # or `make_hf_config` would have refused the model
        if entry.copy or (entry.cut == "whole" and rank > 0):
            continue
        for hf_slice in entry.slices(layer, config, rank):
            held = parameter.data.view(hf_slice.view)[hf_slice.place]
            for tensor in (EMBEDDING, OUTPUT) if twice and hf_slice.name == EMBEDDING else (hf_slice.name,):
                yield tensor, hf_slice.index, held
