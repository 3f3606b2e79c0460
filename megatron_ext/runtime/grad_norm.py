"""The norm of the whole gradient and its clipping, with one number read from the device.

Megatron's own asks for a number of every parameter where neither Transformer Engine nor Apex is installed, and its step asks once
more. Which gradients count, so that none does twice, and which ranks add up is Megatron's in either case.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.runtime.megatron_versions import gradients_for_norm
from megatron_ext.runtime.optimizer_state import single_optimizers

__all__ = ["clip_gradients", "gradient_norm"]

SMALL = 1e-6  # Megatron's, added to the norm that is divided by


@torch.no_grad()
def gradient_norm(optimizer, device: torch.device) -> Tensor:
    """fp32 [], the same on all ranks; every rank calls it, after `prepare_grads`.

    Args:
        optimizer: Megatron's, perhaps a chain.
        device: of the parameters; a rank may have none that trains.
    """
    by_ranks: dict[dist.ProcessGroup, list[Tensor]] = {}
    for single in single_optimizers(optimizer):
        by_ranks.setdefault(single.get_grad_stats_parallel_group(), []).extend(gradients_for_norm(single))
    total = torch.zeros((), dtype=torch.float32, device=device)
    for group, gradients in by_ranks.items():
        square = torch.zeros((), dtype=torch.float32, device=device)
        if gradients:
            square += torch.stack(torch._foreach_norm(gradients)).square().sum()
        dist.all_reduce(square, group=group)
        total += square
    return total.sqrt()


@torch.no_grad()
def clip_gradients(optimizer, norm: float, largest: float) -> None:
    """Scale all gradients so that a norm that is larger becomes `largest`; 0 for none."""
    factor = largest / (norm + SMALL)
    if largest <= 0 or factor >= 1:
        return
    for single in single_optimizers(optimizer):
        if gradients := [p.grad for p in single.get_parameters() if p.grad is not None]:
            torch._foreach_mul_(gradients, factor)
