"""Bytes of parameters, gradients and optimizer state on one rank, as Megatron's DDP and optimizers allocate them.

With the distributed optimizer, parameters and gradients live in one padded buffer each, cut into buckets; every
data-parallel rank (context-parallel ones count) owns an equal stretch of each bucket, and holds optimizer state for the
parameters, or parts of them, that lie there. Without it nothing is padded, and every rank holds all of the state.

The engine's settings stand behind this: gradients in fp32, one bucket but for shared embeddings (no overlap).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.models.config import GPTModelConfig
from megatron_ext.planner.parameters import ParameterTensor

__all__ = ["BufferLayout", "StateBytes", "lay_out", "state_bytes"]

# Megatron-Core 0.16: where a parameter starts, and what a bucket's length divides by, beside the ranks.
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128
FP32 = 4
MOMENTS = 2  # Adam's, in fp32


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

    def fullest(self, ranks: int) -> int:
        """The rank that owns most elements."""
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
        return max(range(ranks), key=held.__getitem__)


def lay_out(parameters: Sequence[ParameterTensor], ranks: int) -> BufferLayout:
    """The distributed optimizer's buffer over `ranks` data-parallel ranks: parameters in reverse order."""
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
        if parameter.shared_embedding:
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

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    config: GPTModelConfig,
    trained: Sequence[ParameterTensor],
    frozen: Sequence[ParameterTensor],
    ranks: int,
    rank: int | None = 0,
    distributed: bool = True,
) -> StateBytes:
    """What an engine with an optimizer holds on one rank of a stage.

    Args:
        trained, frozen: the stage's parameters, in `stage_parameters` order.
        ranks: data-parallel times context-parallel size.
        rank: among those; None: the fullest.
        distributed: whether the optimizer's state is sharded over them.
    """
    item = config.dtype.itemsize
    per_element = FP32 * (MOMENTS + (item < FP32))  # half precision has an fp32 copy of the weights
    still = item * sum(p.numel for p in frozen)
    if not distributed:
        count = sum(p.numel for p in trained)
        return StateBytes(still + item * count, FP32 * count, per_element * count, len(trained))
    layout = lay_out(trained, ranks)
    owned = layout.owned(ranks, layout.fullest(ranks) if rank is None else rank)
    return StateBytes(still + item * layout.numel, FP32 * layout.numel, per_element * sum(owned), len(owned))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
