"""Bytes of parameters, gradients and optimizer state on one rank, as Megatron's DDP and optimizers allocate them.

With the distributed optimizer, parameters and gradients live in one padded buffer each, cut into buckets; every
data-parallel rank (context-parallel ones count) owns an equal stretch of each bucket, and holds optimizer state for the
parameters, or parts of them, that lie there. Without it nothing is padded, and every rank holds all of the state.

A stage in pieces has such buffers for each piece, and one optimizer.

The engine's settings stand behind this: gradients in fp32; one bucket but for shared embeddings, and for the
first piece of the first stage where gradients are summed while backward runs: buckets of a size then (`overlap_bucket`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_ext.models.config import GPTModelConfig
from megatron_ext.planner.parameters import ParameterTensor
from megatron_ext.runtime.lean_adam import MomentStorage, host_numel

__all__ = ["BufferLayout", "StateBytes", "lay_out", "overlap_bucket", "state_bytes"]

# Megatron-Core 0.16: where a parameter starts, and what a bucket's length divides by, beside the ranks.
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128
FP32 = 4
IN_FP32 = MomentStorage()
# Numbers in a bucket at least, and for each data-parallel rank at least.
BUCKET_NUMEL, BUCKET_NUMEL_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True)
class BufferLayout:
    """Places in a buffer, in elements.

    Attributes:
        numel: its length, padding included.
        places: (start, end) of every parameter.
        buckets: (start, end) of every bucket.
    """

    numel: int
    places: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    def owned(self, ranks: int, rank: int) -> list[int]:
        """Elements of each parameter, or part of one, whose optimizer state this data-parallel rank holds."""
        found = []
        for start, end in self.buckets:
            size = (end - start) // ranks
            low, high = start + rank * size, start + (rank + 1) * size
            found += [min(b, high) - max(a, low) for a, b in self.places if min(b, high) > max(a, low)]
        return found

    def held(self, ranks: int) -> list[int]:
        """Elements that each rank owns."""
        held = [0] * ranks
        for first, last in self.buckets:
            size = (last - first) // ranks
            for start, end in self.places:
                if not first <= start < last:
                    continue
                rank = (start - first) // size
                while start < end:
                    edge = first + (rank + 1) * size
                    held[rank] += min(end, edge) - start
                    start, rank = edge, rank + 1
        return held


def overlap_bucket(data_ranks: int) -> int:
    """At how many numbers a bucket is closed, where gradients are summed while backward runs."""
    return max(BUCKET_NUMEL, BUCKET_NUMEL_PER_RANK * data_ranks)


def lay_out(parameters: Sequence[ParameterTensor], ranks: int, bucket: int | None = None) -> BufferLayout:
    """The distributed optimizer's buffer over `ranks` data-parallel ranks: parameters in reverse order.

    Args:
        bucket: numbers at which a bucket is closed; None: at the end.
    """
    places: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = end = 0

    def close(at: int) -> int:
        nonlocal bucket_start
        padded = _up(at, math.lcm(ranks, BUCKET_ALIGNMENT))
        buckets.append((bucket_start, padded))
        bucket_start = padded
        return padded

    for parameter in reversed(parameters):
        start = _up(end, PARAMETER_ALIGNMENT)
        if parameter.shared_embedding and start > bucket_start:
            start = close(start)
        end = start + parameter.numel
        places.append((start, end))
        if parameter.shared_embedding or (bucket is not None and end - bucket_start >= bucket):
            end = close(end)
    if end > bucket_start:
        end = close(end)
    return BufferLayout(end, tuple(places), tuple(buckets))


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank. A `step` counter that torch's Adam keeps for each tensor, in host memory, is not among them."""

    parameters: int
    gradients: int
    optimizer: int
    # Tensors with optimizer state on this rank.
    optimizer_tensors: int
    # In the host's memory.
    host: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def state_bytes(
    config: GPTModelConfig,
    trained: Sequence[ParameterTensor],
    frozen: Sequence[ParameterTensor],
    ranks: int,
    rank: int | None = 0,
    distributed: bool = True,
    moments: MomentStorage = IN_FP32,
    bucket: int | None = None,
) -> StateBytes:
    """What an engine with an optimizer holds on one rank of a stage.

    Args:
        trained, frozen: the stage's parameters, in `stage_parameters` order.
        ranks: data-parallel times context-parallel size.
        rank: among those; None: the fullest. Of moments of which a share lies on the host, another rank may have more by a
            number for each tensor.
        distributed: whether the optimizer's state is sharded over them.
        moments: where Adam's are, and of what types.
        bucket: of the first piece, see `lay_out`.
    """
    item = config.dtype.itemsize
    still = item * sum(p.numel for p in frozen)
    if not distributed:
        count = sum(p.numel for p in trained)
        optimizer, host = _optimizer(item, moments, [p.numel for p in trained])
        return StateBytes(still + item * count, FP32 * count, optimizer, len(trained), host)
    pieces = sorted({p.piece for p in trained})
    layouts = [lay_out([p for p in trained if p.piece == piece], ranks, None if piece else bucket) for piece in pieces]
    if rank is None:
        held = [sum(of_pieces) for of_pieces in zip(*(layout.held(ranks) for layout in layouts), strict=True)]
        rank = max(range(ranks), key=held.__getitem__) if held else 0
    owned = [numel for layout in layouts for numel in layout.owned(ranks, rank)]
    total = sum(layout.numel for layout in layouts)
    optimizer, host = _optimizer(item, moments, owned)
    return StateBytes(still + item * total, FP32 * total, optimizer, len(owned), host)


def _optimizer(item: int, moments: MomentStorage, tensors: Sequence[int]) -> tuple[int, int]:
    """Bytes of the state of tensors of so many numbers: on the device, on the host."""
    each = sum(dtype.itemsize for dtype in moments.types)
    there = sum(host_numel(moments.on_host, numel) for numel in tensors)
    count = sum(tensors)
    copies = FP32 * (item < FP32)  # half precision has an fp32 copy of the weights
    return copies * count + each * (count - there), each * there


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
