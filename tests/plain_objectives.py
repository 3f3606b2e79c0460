"""The objectives once more, one response at a time and written by cases, with nothing of ours: an oracle for loss and
gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["PlainResponse", "plain_loss", "plain_policy"]


@dataclass
class PlainResponse:
    """What is known of one response, [n] each but the advantage."""

    logprobs: Tensor
    old: Tensor
    reference: Tensor
    entropy: Tensor
    mask: Tensor
    advantage: float
    importance: Tensor = field(default_factory=lambda: torch.ones(()))


def plain_policy(name: str, options: dict[str, Any], of: PlainResponse, gains: Tensor) -> Tensor:
    """[n]: what each token adds to the loss before it is weighed."""
    ratio = (of.logprobs - of.old).exp()
    if name == "gpg":
        return -gains * of.logprobs
    if name == "cispo":
        weight = ratio.detach().clamp(options["ratio_min"], options["ratio_max"])
        return -weight * gains * of.logprobs
    if name == "sapo":
        losses = []
        for rho, gain in zip(ratio, gains, strict=True):
            tau = options["temperature_positive" if gain > 0 else "temperature_negative"]
            losses.append(-4 / tau / (1 + (-tau * (rho - 1)).exp()) * gain)
        return torch.stack(losses) if losses else ratio
    if options["sequence_level_ratios"] and bool(of.mask.any()):
        mean = (of.logprobs - of.old)[of.mask].mean().detach().exp()
        ratio = mean * (of.logprobs - of.logprobs.detach()).exp()
    low, high = 1 - options["ratio_clip_min"], 1 + options["ratio_clip_max"]
    losses = []
    for rho, gain in zip(ratio, gains, strict=True):
        if gain > 0:
            kept = rho if rho <= high else high
        else:
            kept = rho if rho >= low else low
            if options["ratio_max"] is not None and kept > options["ratio_max"]:
                kept = options["ratio_max"]
        losses.append(-kept * gain)
    return torch.stack(losses) if losses else ratio


def plain_loss(
    name: str,
    options: dict[str, Any],
    batch: list[PlainResponse],
    beta: float = 0.0,
    kl: str = "k3",
    eta: float = 0.0,
    constant: float = 1.0,
) -> Tensor:
    """The loss of a whole batch.

    Args:
        options: every option of the objective.
        kl: k2, k3, weighted (k3 by the ratio) or reward (k1).
        constant: what tokens are divided by where normalisation is constant.
    """
    tokens = sum(int(of.mask.sum()) for of in batch)
    responses = sum(bool(of.mask.any()) for of in batch)
    total = torch.zeros((), dtype=torch.float64)
    for of in batch:
        if not bool(of.mask.any()):
            continue
        gains = torch.full_like(of.old, of.advantage)
        if kl == "reward":
            gains = gains - beta * (of.old - of.reference)
        each = plain_policy(name, options, of, gains)
        d = of.logprobs - of.reference
        k3 = (-d).exp() - 1 + d
        if kl == "k2":
            each = each + beta * d**2 / 2
        elif kl == "k3":
            each = each + beta * k3
        elif kl == "weighted":
            each = each + beta * (of.logprobs - of.old).exp() * k3
        each = (each - eta * of.entropy) * of.importance
        divided = {
            "token": tokens,
            "sequence": int(of.mask.sum()) * responses,
            "constant": constant,
        }[options["normalisation"]]
        # Weights are fp32, in both.
        total = total + each[of.mask].sum() * float(torch.tensor(1.0) / torch.tensor(float(divided)))
    return total
