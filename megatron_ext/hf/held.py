"""What a rank holds of the Hugging Face model: its parameters in the table of `mapping`, and its parts of whole tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from megatron_ext.adapters import adapted_linears, adapter_parameters
from megatron_ext.hf.mapping import EMBEDDING, OURS, OUTPUT, Entry, TensorSlice, entries, find_entry
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.pieces import pieces_of
from megatron_ext.runtime.slices import slice_of

__all__ = ["held_places", "held_slices", "placed_parameters", "tensor_rank"]


def placed_parameters(model: PrefixGroupedGPT) -> Iterator[tuple[str, torch.Tensor, Entry | None, int]]:
    """(name, parameter, its entry, layer counted from the first stage) of this rank, without adapters and slices; no entry for
    what Hugging Face's model has not, such as a projector of media. Experts' biases, which no gradient moves, are among them."""
    config, known = model.model_config, entries(model.model_config)
    local = (config.num_moe_experts or 0) // config.expert_model_parallel_size
    first = local * parallel_state.get_expert_model_parallel_rank()
    for piece in pieces_of(model):
        adapters = adapter_parameters(piece)
        biases = ((name, buffer) for name, buffer in piece.named_buffers() if name.endswith(".expert_bias"))
        for name, parameter in itertools.chain(piece.named_parameters(), biases):
            if name in adapters or slice_of(parameter) is not None:
                continue
            layer, pattern = 0, name
            if found := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
                layer, pattern = piece.decoder.layers[int(found[1])].layer_number - 1, OURS + found[2]
            yield name, parameter, find_entry(known, pattern, first), layer


def tensor_rank(model: PrefixGroupedGPT, entry: Entry) -> int:
    """This rank's number among those that share a parameter."""
    return parallel_state.get_expert_tensor_parallel_rank() if entry.expert else model.pg_collection.tp.rank()


def held_slices(model: PrefixGroupedGPT, untied: bool = False) -> Iterator[tuple[str, tuple[slice, ...], torch.Tensor]]:
    """This rank's part of the Hugging Face model, in the order of its parameters: (tensor, index in it, what is there). Of the
    ranks that hold the same numbers one gives each. All ranks of a tensor-parallel group call it.

    What is there may have its rows in equal groups, [groups, rows of a group, ...]. Adapters are merged into it, a weight at a
    time, unless the model is run without them; the model stays as it is.

    Args:
        untied: see `mapping.hf_shapes`.
    """
    # What ranks gather is gathered before any of them waits for another's part.
    used = [linear for linear in adapted_linears(model).values() if linear.uses_adapter]
    adapted = {id(linear.weight): (linear, linear.lora.gathered_b()) for linear in used}
    merged: tuple[int, torch.Tensor] | None = None  # the newest: a parameter may come in several slices
    for tensor, hf_slice, parameter in _held(model, untied):
        data = parameter.data
        if id(parameter) in adapted:
            if merged is None or merged[0] != id(parameter):
                linear, b = adapted[id(parameter)]
                merged = id(parameter), linear.merged_weight(b)
            data = merged[1]
        here = hf_slice.within(data)
        yield tensor, hf_slice.index, here if hf_slice.order is None else here.reshape(_extent(hf_slice.index))


def _extent(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in index)


def held_places(model: PrefixGroupedGPT, untied: bool = False) -> list[tuple[str, tuple[slice, ...]]]:
    """(tensor, index in it) of `held_slices`, without making what is there."""
    return [(tensor, hf_slice.index) for tensor, hf_slice, _ in _held(model, untied)]


def _held(model: PrefixGroupedGPT, untied: bool) -> Iterator[tuple[str, TensorSlice, torch.Tensor]]:
    config = model.model_config
    twice = untied and config.share_embeddings_and_output_weights
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    first_of_experts = parallel_state.get_expert_data_parallel_rank() == 0
    for name, parameter, entry, layer in placed_parameters(model):
        assert entry is not None, name  # or `make_hf_config` would have refused the model
        rank = tensor_rank(model, entry)
        if entry.copy or not (first_of_experts if entry.expert else first) or (entry.cut == "whole" and rank > 0):
            continue
        for hf_slice in entry.slices(layer, config, rank):
            for tensor in (EMBEDDING, OUTPUT) if twice and hf_slice.name == EMBEDDING else (hf_slice.name,):
                yield tensor, hf_slice, parameter
