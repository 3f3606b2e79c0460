"""SAPO: a soft gate in place of a clip.

Source: Soft Adaptive Policy Optimization (arXiv 2511.20347). With rho_i = pi(y_i) / pi_old(y_i):

    l_i = -(4 / tau_i) sigmoid(tau_i (rho_i - 1)) A_i

whose derivative by log pi is -4 sigma (1 - sigma) rho_i A_i: that of the plain ratio at rho = 1, and smooth on the way to 0.

| symbol | key of trainer.grpo.objective |
|---|---|
| tau where A > 0 | temperature_positive |
| tau elsewhere | temperature_negative: larger, so that what is bad is let go sooner |

Sequence level, group advantages. rho is exactly 1 where one optimizer step follows a batch, so log-probabilities of the policy
that sampled need no pass of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.kl import bounded_exp, with_derivative
from megatron_ext.losses.objective import Objective, PolicyTokens

__all__ = ["Sapo"]


@dataclass(frozen=True, kw_only=True)
class Sapo(Objective):
    """See the module."""

    # How steep the gate is.
    temperature_positive: float = 1.0
    temperature_negative: float = 1.05
    normalisation: str = "sequence"

    def __post_init__(self):
        super().__post_init__()
        for name in ("temperature_positive", "temperature_negative"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise UserError(f"{name}={value} must be positive and finite")

    def policy_loss(self, tokens: PolicyTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.policy_loss`."""
        ratio, gains = bounded_exp(tokens.log_ratio.detach()), tokens.advantages
        steep = torch.full_like(ratio, self.temperature_negative).masked_fill(gains > 0, self.temperature_positive)
        at = steep * (ratio - 1)
        gate = torch.sigmoid(at)
        # sigmoid(-x), and not 1 - sigmoid(x), whose digits cancel.
        slope = 4 * gate * torch.sigmoid(-at) * ratio
        soft = with_derivative(4 / steep * gate, slope, tokens.logprobs)
        return -soft * gains, {"ratio": (tokens.weights * ratio).sum()}
