"""A model of ours as whole Hugging Face tensors in the memory of rank 0's host, from any layout of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.hf.mapping import held_slices
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

    Each rank of the first data-parallel replica sends its parts one after the other, so no device holds more of another's than
    one of them.

    Args:
        target: on rank 0, of `hf_shapes`; None on the others.
        dtype: in which parts are sent; the target's.
        untied: see `hf_shapes`.
    """
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    group = parallel_state.get_model_parallel_group()
    parts = [(name, index, held) for name, index, held in held_slices(model, untied) if held.numel()]
    places = gather_objects([(name, index) for name, index, _ in parts], group)
    if target is None:
        first = dist.get_global_rank(group, 0)
        for _, _, held in parts:
            dist.send(held.to(dtype).contiguous(), first, group)
        return
    for name, index, held in parts:
        _put(target, name, index, held)
    device = parts[0][2].device
    for number, theirs in enumerate(places[1:], 1):
        source = dist.get_global_rank(group, number)
        for name, index in theirs:
            part = torch.empty(target.tensors[name][index].shape, dtype=dtype, device=device)
            dist.recv(part, source, group)
            _put(target, name, index, part)


def _put(target: HostTensors, name: str, index: tuple[slice, ...], part: Tensor) -> None:
    place = target.tensors[name][index]
    place.copy_(part.reshape(place.shape))  # its rows may come in groups
