"""AdamW whose moments lie in the host's memory, and which is computed there.

A weight's gradient is copied to the host, the step is taken, and the weight is copied back, one tensor after the other: on the
device no tensor but these is needed, on the host twice the largest beside the moments. Megatron's own offloading
(`HybridDeviceOptimizer`) does as much, but runs on a GPU alone, and its state is not in the shape that our checkpoints have.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_ext.devices import device_type

__all__ = ["HostAdamW"]

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(torch.optim.AdamW):
    """Steps of the parameter groups of another Adam, whose learning rates and weight decays it reads at each step.

    Attributes:
        state_device: of the moments.
    """

    state_device = torch.device("cpu")

    def __init__(self, inner: torch.optim.Optimizer):
        """Takes the place of `inner`, before it has taken a step."""
        assert not inner.state, "its moments would be lost"
        super().__init__([torch.zeros(())])  # torch takes no views, such as Megatron's stretches of its buffers
        self.param_groups = inner.param_groups  # the same list: the learning rate's schedule writes to it
        self._room: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Of the moments."""
        return sum(state[moment].nbytes for state in self.state.values() for moment in MOMENTS)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None, "Megatron gives none"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in MOMENTS:
                state[moment] = torch.zeros(parameter.shape, dtype=torch.float32, device=self.state_device)
        weight, gradient = self._on_host("weight", parameter), self._on_host("gradient", parameter.grad)
        if _is_cuda(parameter):
            torch.cuda.current_stream().synchronize()
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [gradient], *([state[moment]] for moment in MOMENTS), [], [state["step"]],
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False, fused=True,
        )  # fmt: skip
        if weight is not parameter:
            parameter.copy_(weight)  # waits: the room is used again

    def _on_host(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor itself where it is on the host, else a copy in page-locked room that all of them share."""
        if not _is_cuda(tensor):
            return tensor
        room = self._room.get(name)
        if room is None or room.numel() < tensor.numel():
            room = self._room[name] = torch.empty(tensor.numel(), dtype=torch.float32, pin_memory=True)
        return room[: tensor.numel()].view(tensor.shape).copy_(tensor, non_blocking=True)


def _is_cuda(tensor: Tensor) -> bool:
    return device_type(tensor.device) == "cuda"
