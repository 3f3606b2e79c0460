"""Activation patching: what a place of a model adds, taken from another prompt of the same length while all else runs on.

Shape legend: t rows of the stream, b = 1, h hidden size, n query heads, d channels of a head's output, tp tensor-parallel size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_ext.blocks.blocks import blocks_here, tapped
from megatron_ext.blocks.places import ModelPlace, head_rows
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.prompt_streams import PromptStream

__all__ = ["all_rows", "exchanged", "swapped_rows"]


@contextlib.contextmanager
def exchanged(model: PrefixGroupedGPT, place: ModelPlace, rows: Tensor) -> Iterator[None]:
    """While inside, what the place adds at each row of a stream is that of another row, without gradient.

    Of a block that is H_out - H_in, of attention and MLP what they give to the residual stream, of a head what the output
    projection reads of it.

    Args:
        rows: int64 [t], see `swapped_rows`.
    """
    if place.part is None:

        def exchange(block: int, before: Tensor, after: Tensor) -> Tensor | None:
            return before + _taken(model, after - before, rows) if block == place.block else None

        with tapped(model, exchange):
            yield
        return
    layer = blocks_here(model).get(place.block)
    if layer is None:
        yield
        return
    handle = _patch_heads(model, layer, place, rows) if place.heads else _patch_part(model, layer, place, rows)
    try:
        yield
    finally:
        handle.remove()


def _patch_part(model: PrefixGroupedGPT, layer: torch.nn.Module, place: ModelPlace, rows: Tensor):
    def exchange(module, args, output: tuple[Tensor, Any]):
        added, *rest = output
        return (_taken(model, added, rows), *rest)

    return (layer.self_attention if place.part == "attention" else layer.mlp).register_forward_hook(exchange)


def _patch_heads(model: PrefixGroupedGPT, layer: torch.nn.Module, place: ModelPlace, rows: Tensor):
    found = head_rows(layer, model.model_config, place.heads, model.pg_collection.tp)
    (columns,) = (part.mine for part in found if part.dim == 1)  # of the output projection

    def exchange(module, args):
        heads, *rest = args  # [t, 1, n d / tp]: all rows, of this rank's heads
        changed = heads.clone()
        changed[..., columns] = heads[..., columns][rows]
        return (changed, *rest)

    return layer.self_attention.linear_proj.register_forward_pre_hook(exchange)


def swapped_rows(stream: PromptStream) -> Tensor:
    """int64 [t]: of each row, the same row of the other prompt of its pair, which is its neighbour; the pad stays."""
    rows = torch.arange(len(stream.batch.tokens), device=stream.ends.device)
    segments = stream.batch.groups.segments
    for first, second in zip(segments[::2], segments[1::2], strict=True):
        a, b = slice(first.start, first.start + first.length), slice(second.start, second.start + second.length)
        rows[a], rows[b] = rows[b].clone(), rows[a].clone()
    return rows


def all_rows(model: PrefixGroupedGPT, hidden: Tensor) -> Tensor:
    """[t (/ tp), 1, h] -> [t, h]."""
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=model.pg_collection.tp)
    return hidden.squeeze(1)


def _taken(model: PrefixGroupedGPT, hidden: Tensor, rows: Tensor) -> Tensor:
    """[t (/ tp), 1, h] of these rows."""
    taken = all_rows(model, hidden)[rows]
    if model.config.sequence_parallel:
        group = model.pg_collection.tp
        taken = taken.chunk(group.size())[group.rank()]
    return taken.unsqueeze(1)
