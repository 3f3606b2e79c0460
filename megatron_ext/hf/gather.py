"""A model of ours as whole Hugging Face tensors in the memory of rank 0's host, from any layout of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.hf.held import held_places, held_slices
from megatron_ext.hf.tensors import is_finite, not_finite
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.collectives import gather_objects

__all__ = ["HostTensors", "gather_hf"]


class HostTensors:
    """Tensors of one type in the host's memory, one behind the other in chunks.

    Args:
        shapes: by name, in order.
        chunk_bytes: each chunk but the last ends with the tensor that makes it larger than this.

    Attributes:
        chunks: [numbers of its tensors], of `dtype`.
        tensors: by name, views of the chunks.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, chunk_bytes: int):
        self.dtype, self.chunk_bytes = dtype, chunk_bytes
        self.chunks: list[Tensor] = []
        self.tensors: dict[str, Tensor] = {}
        for names in _parts(shapes, chunk_bytes // dtype.itemsize):
            sizes = [math.prod(shapes[name]) for name in names]
            self.chunks.append(torch.empty(sum(sizes), dtype=dtype))
            for name, part in zip(names, self.chunks[-1].split(sizes), strict=True):
                self.tensors[name] = part.view(shapes[name])

    def check_finite(self) -> None:
        """
        Raises:
            UserError: a number is not.
        """
        for name, tensor in self.tensors.items():
            if not is_finite(tensor):
                raise not_finite(name, self.dtype)


def _parts(shapes: dict[str, tuple[int, ...]], most: int) -> Iterator[list[str]]:
    """Names, cut behind those that make a part larger than `most` numbers."""
    names, size = [], 0
    for name, shape in shapes.items():
        names.append(name)
        size += math.prod(shape)
        if size > most:
            yield names
            names, size = [], 0
    if names:
        yield names


@torch.no_grad()
def gather_hf(model: PrefixGroupedGPT, target: HostTensors | None, dtype: torch.dtype, untied: bool = False) -> None:
    """Fill `target` with the whole model; every rank calls it.

    Of the ranks that hold the same numbers one sends its parts, one after the other, so no device holds more of another's than
    one of them.

    Args:
        target: on rank 0, of `hf_shapes`; None on the others.
        dtype: in which parts are sent; the target's.
        untied: see `hf_shapes`.
    """
    if model.config.expert_model_parallel_size > 1:  # experts lie on several data-parallel ranks
        group = dist.group.WORLD
    elif parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        group = parallel_state.get_model_parallel_group()
    else:
        return
    parts = held_slices(model, untied)  # one at a time: with adapters each is made for this
    places = gather_objects(held_places(model, untied), group)
    if target is None:
        first = dist.get_global_rank(group, 0)
        for _, _, held in parts:
            if held.numel():
                dist.send(held.to(dtype).contiguous(), first, group)
        return
    for name, index, held in parts:
        if held.numel():
            _put(target, name, index, held)
    device = next(model.parameters()).device
    for number, theirs in enumerate(places[1:], 1):
        source = dist.get_global_rank(group, number)
        for name, index in theirs:
            part = torch.empty(target.tensors[name][index].shape, dtype=dtype, device=device)
            if not part.numel():
                continue
            dist.recv(part, source, group)
            _put(target, name, index, part)


def _put(target: HostTensors, name: str, index: tuple[slice, ...], part: Tensor) -> None:
    place = target.tensors[name][index]
    place.copy_(part.reshape(place.shape))  # its rows may come in groups
