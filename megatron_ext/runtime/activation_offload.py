"""Layers' inputs in the host's memory between a stream's forward and backward pass: `model.activation_offload`.

Under full recomputation these are all that layers keep. Each is copied to the host when its layer has run, and back while the
layer above it is recomputed, on a stream of its own: of a stage's layers two have their input on the device at a time.

Shape legend: s rows of the residual stream on this rank, b = 1, h hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_ext.devices import device_type

__all__ = ["LayerInputs", "offloaded_inputs"]


@dataclass(eq=False)
class _Kept:
    """One layer's input: on the host, and on its way back."""

    host: Tensor
    device: torch.device
    below: _Kept | None
    back: Tensor | None = None
    copied: torch.cuda.Event | None = None


class LayerInputs:
    """Of one stream on its way through a stage.

    Args:
        layers: of the stage. Each keeps one tensor [s, b, h], before anything else of that shape is kept.
        hidden_size, dtype: of the residual stream.
    """

    def __init__(self, layers: int, hidden_size: int, dtype: torch.dtype):
        self.left, self.hidden_size, self.dtype = layers, hidden_size, dtype
        self._last: _Kept | None = None

    def pack(self, tensor: Tensor) -> Tensor | _Kept:
        """What autograd keeps instead of a tensor."""
        if not self.left or tensor.dim() != 3 or tensor.size(2) != self.hidden_size or tensor.dtype != self.dtype:
            return tensor
        self.left -= 1
        is_cuda = device_type(tensor.device) == "cuda"
        room = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_cuda)
        if is_cuda:
            side = _side_stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                room.copy_(tensor, non_blocking=True)
            tensor.record_stream(side)
        else:
            room.copy_(tensor)
        self._last = _Kept(room, tensor.device, self._last)
        return self._last

    @staticmethod
    def unpack(kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        _bring(kept)
        tensor, kept.back = kept.back, None
        if kept.copied is not None:
            torch.cuda.current_stream().wait_event(kept.copied)
            tensor.record_stream(torch.cuda.current_stream())
            if kept.below is not None:  # needed next; without a GPU nothing would be gained
                _bring(kept.below)
        return tensor


@contextlib.contextmanager
def offloaded_inputs(layers: int, hidden_size: int, dtype: torch.dtype) -> Iterator[None]:
    """Around a stage's layers, for one stream; see `LayerInputs`."""
    inputs = LayerInputs(layers, hidden_size, dtype)
    with saved_tensors_hooks(inputs.pack, inputs.unpack):
        yield


def _bring(kept: _Kept) -> None:
    """Start the copy to the device."""
    if kept.back is not None:
        return
    if device_type(kept.device) != "cuda":
        kept.back = kept.host.clone()
        return
    side = _side_stream()
    with torch.cuda.stream(side):  # behind the copy to the host
        kept.back = kept.host.to(kept.device, non_blocking=True)
        kept.copied = side.record_event()


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()
