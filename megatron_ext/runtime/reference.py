"""The weights that a model has at one moment, kept to run it with them later: the reference policy of a KL divergence.

They stay on the device, or on the host. From there they are put into the gradient buffers for as long as they are used: these
are idle while nothing trains, and large enough (fp32 numbers, for weights of at most 4 bytes). So they cost no memory of the
device, and one copy for a pass over any number of streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_ext.devices import device_type
from megatron_ext.runtime.engine import Engine

__all__ = ["ReferenceWeights"]


class ReferenceWeights:
    """
    Args:
        engine: with an optimizer; all parameters of its model train.
        on_host: keep them in the host's memory, page-locked where there is a GPU.
    """

    def __init__(self, engine: Engine, on_host: bool = False):
        self.engine, self.on_host = engine, on_host
        engine.gather_weights()
        self.parameters = list(engine.module.parameters())
        assert not on_host or all(hasattr(p, "main_grad") for p in self.parameters), "a frozen weight has no gradient"
        self.weights = [self._kept(p.detach()) for p in self.parameters]

    def _kept(self, weight: Tensor) -> Tensor:
        if not self.on_host:
            return weight.clone()
        room = torch.empty(
            weight.shape, dtype=weight.dtype, device="cpu", pin_memory=device_type(weight.device) == "cuda"
        )
        return room.copy_(weight)

    @property
    def nbytes(self) -> int:
        """Of this rank, where they are kept."""
        return sum(w.nbytes for w in self.weights)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Run the model with them, and put its own back whatever happens. For forward passes only; of weights that are kept on
        the host, gradients are zero afterwards."""
        own = [p.data for p in self.parameters]
        try:
            for parameter, weight in zip(self.parameters, self.weights, strict=True):
                parameter.data = _in_gradient(parameter, weight) if self.on_host else weight
            yield
        finally:
            for parameter, weight in zip(self.parameters, own, strict=True):
                parameter.data = weight
            if self.on_host:
                self.engine.zero_grad()


def _in_gradient(parameter: torch.nn.Parameter, weight: Tensor) -> Tensor:
    """The weight on the device, in the place of the parameter's gradient."""
    room = parameter.main_grad.view(-1).view(weight.dtype)[: weight.numel()].view(weight.shape)
    return room.copy_(weight, non_blocking=True)
