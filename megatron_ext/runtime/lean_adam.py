"""AdamW whose moments take less of the device's memory: some or all of them lie in the host's, or they are kept in bf16.

Of each weight the first numbers may have their moments on the host, where their step is taken, too: their gradient is copied
there and the weight back, one tensor after the other, while the device takes the step of the others. On the device no tensor
but these is needed, on the host twice the largest part beside the moments. Moments in bf16 are made fp32 for their step, one
tensor's at a time, and rounded to the nearest again.

Megatron's own ways, `HybridDeviceOptimizer` and the precision-aware optimizer, run on a GPU alone, the second with Transformer
Engine's Adam alone, and their state is not in the shape that our checkpoints have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_ext.devices import device_type

__all__ = ["HOST", "MOMENT_TYPES", "LeanAdamW", "MomentStorage", "host_numel"]

MOMENTS = ("exp_avg", "exp_avg_sq")
HOST = "host_"  # begins the names of moments that lie there
MOMENT_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def host_numel(share: float, numel: int) -> int:
    """Of so many numbers, how many have their moments on the host."""
    return int(share * numel)


@dataclass(frozen=True)
class MomentStorage:
    """Where Adam's moments are kept, and in which types.

    Attributes:
        on_host: the share of each tensor's numbers whose moments lie in the host's memory, 0 to 1.
        types: of the first and the second moment.
    """

    on_host: float = 0.0
    types: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)

    @property
    def is_plain(self) -> bool:
        """Whether any Adam keeps them so."""
        return self.on_host == 0 and set(self.types) == {torch.float32}


class LeanAdamW(torch.optim.AdamW):
    """Steps of the parameter groups of another Adam, whose learning rates and weight decays it reads at each step.

    Of a parameter, its state has `step`, and flat `exp_avg`, `exp_avg_sq` of what is on the device, `host_exp_avg` and
    `host_exp_avg_sq` of what is on the host, of the types of `storage`.
    """

    def __init__(self, inner: torch.optim.Optimizer, storage: MomentStorage):
        """Takes the place of `inner`, before it has taken a step."""
        assert not inner.state, "its moments would be lost"
        super().__init__([torch.zeros(())])  # torch takes no views, such as Megatron's stretches of its buffers
        self.param_groups = inner.param_groups  # the same list: the learning rate's schedule writes to it
        self.storage = storage
        self._room: dict[str, Tensor] = {}

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Both moments of a parameter, [numel] in fp32 on its device; none before the first step."""
        state = self.state.get(parameter, {})
        parts = lambda moment: [state[HOST + moment], state[moment]]  # noqa: E731
        return {m: torch.cat([x.to(parameter.device, torch.float32) for x in parts(m)]) for m in MOMENTS if m in state}

    def load(self, parameter: Tensor, moments: dict[str, Tensor], step: int) -> None:
        """Put moments, [numel] each, where a parameter's are kept, after so many steps."""
        state = self._state(parameter)
        state["step"].fill_(float(step))
        for moment, value in moments.items():
            count = state[HOST + moment].numel()
            state[HOST + moment].copy_(value[:count])
            state[moment].copy_(value[count:])

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None, "Megatron gives none"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            there = host_numel(self.storage.on_host, parameter.numel())
            here = parameter.numel() - there
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment, dtype in zip(MOMENTS, self.storage.types, strict=True):
                state[moment] = torch.zeros(here, dtype=dtype, device=parameter.device)
                state[HOST + moment] = torch.zeros(there, dtype=dtype)
        return state

    def _update(self, parameter: Tensor, group: dict) -> None:
        state = self._state(parameter)
        weight, gradient = parameter.view(-1), parameter.grad.view(-1)
        cut = state[HOST + MOMENTS[0]].numel()
        step = state["step"]
        if cut:
            near = weight[:cut]
            far, slope = self._on_host("weight", near), self._on_host("gradient", gradient[:cut])
            copied = torch.cuda.current_stream().record_event() if _is_cuda(parameter) else None
        if cut < len(weight):  # runs while the host takes its part
            _adamw(weight[cut:], gradient[cut:], [state[moment] for moment in MOMENTS], step.clone(), group)
        if cut:
            if copied is not None:
                copied.synchronize()
            _adamw(far, slope, [state[HOST + m] for m in MOMENTS], step.clone(), group, fused=True)
            if copied is not None:
                near.copy_(far)  # waits: the room is used again
        step += 1

    def _on_host(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor itself where it is on the host, else a copy in page-locked room that all of them share."""
        if not _is_cuda(tensor):
            return tensor
        room = self._room.get(name)
        if room is None or room.numel() < tensor.numel():
            room = self._room[name] = torch.empty(tensor.numel(), dtype=torch.float32, pin_memory=True)
        return room[: tensor.numel()].copy_(tensor, non_blocking=True)


def _adamw(
    weight: Tensor, gradient: Tensor, moments: list[Tensor], step: Tensor, group: dict, fused: bool = False
) -> None:
    """One step, [numel] each."""
    whole = [m.float() for m in moments]  # themselves where they are fp32
    beta1, beta2 = group["betas"]
    adamw(
        [weight], [gradient], *([m] for m in whole), [], [step],
        amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=False, fused=fused, foreach=False,
    )  # fmt: skip
    for moment, value in zip(moments, whole, strict=True):
        if value is not moment:
            moment.copy_(value)


def _is_cuda(tensor: Tensor) -> bool:
    return device_type(tensor.device) == "cuda"
