"""The weights that a model has at one moment, kept to run it with them later: the reference policy of a KL divergence. Of a model
with adapters they are there: it is the model without them.

They stay on the device, or on the host. From there they are put into the gradient buffers for as long as they are used: these
are idle while nothing trains, and large enough (fp32 numbers, for weights of at most 4 bytes). So they cost no memory of the
device, and one copy for a pass over any number of streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from megatron_ext.adapters import without_adapters
from megatron_ext.devices import device_type
from megatron_ext.runtime.engine import Engine

__all__ = ["ReferenceBase", "ReferenceWeights"]


class ReferenceBase:
    """The frozen model that adapters stand on, which costs no memory.

    Args:
        engine: of a model with adapters.
    """

    nbytes = 0

    def __init__(self, engine: Engine):
        self.engine = engine

    def used(self) -> AbstractContextManager[None]:
        """Run the model without its adapters."""
        return without_adapters(self.engine.module)


class ReferenceWeights:
    """
    Args:
        engine: with an optimizer; what does not train, such as a frozen vision tower, is the same in both policies.
        on_host: keep them in the host's memory, page-locked where there is a GPU.
    """

    def __init__(self, engine: Engine, on_host: bool = False):
        self.engine, self.on_host = engine, on_host
        engine.gather_weights()
        self.parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self.weights = [self._kept(p.detach()) for p in self.parameters]
        self.routers = [router for router in engine.routers if router.expert_bias is not None]
        self.biases = [router.expert_bias.clone() for router in self.routers]

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
        own, biases = [p.data for p in self.parameters], [router.expert_bias for router in self.routers]
        try:
            for router, bias in zip(self.routers, self.biases, strict=True):
                router.expert_bias = bias
            for parameter, weight in zip(self.parameters, self.weights, strict=True):
                parameter.data = _in_gradient(parameter, weight) if self.on_host else weight
            yield
        finally:
            for parameter, weight in zip(self.parameters, own, strict=True):
                parameter.data = weight
            for router, bias in zip(self.routers, biases, strict=True):
                router.expert_bias = bias
            if self.on_host:
                self.engine.zero_grad()


def _in_gradient(parameter: torch.nn.Parameter, weight: Tensor) -> Tensor:
    """The weight on the device, in the place of the parameter's gradient."""
    room = parameter.main_grad.view(-1).view(weight.dtype)[: weight.numel()].view(weight.shape)
    return room.copy_(weight, non_blocking=True)
