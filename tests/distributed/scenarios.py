"""What scenarios have in common: optimizers, a model's parameters, a step that is refused."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_ext.errors import DivergedError
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.optim import OptimConfig
from megatron_ext.runtime.slices import slice_of, write_slices

__all__ = ["CLIP", "OPTIMIZERS", "copies", "optim", "refuses_step"]

CLIP = 0.3  # below the gradient's norm


def optim(name: str = "adam") -> OptimConfig:
    """A large eps: Adam divides by |g| + eps, so rounding of a gradient near zero must not become a step of full size."""
    return OptimConfig(name=name, lr=1e-2, eps=1e-3)


OPTIMIZERS = {
    "adam": optim("adam"),
    "distributed_fused_adam": optim("distributed_fused_adam"),
    "overlapped": replace(optim("distributed_fused_adam"), overlap_grad_reduce=True),
    "on the host": replace(optim("distributed_fused_adam"), optimizer_cpu_offload=True),
}


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters, with their slices in them."""
    write_slices(model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if slice_of(p) is None}


def refuses_step(engine: Engine) -> bool:
    try:
        engine.step()
    except DivergedError:
        return True
    return False
