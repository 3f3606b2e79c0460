"""CISPO: the ratio weighs a token's log-probability and is bounded itself, so that no token loses its gradient.

Source: MiniMax-M1 (arXiv 2506.13585), eq. 4 and 5. With rho_i = pi(y_i) / pi_old(y_i) and no gradient through the weight:

    l_i = -clip(rho_i, ratio_min, ratio_max) A_i log pi(y_i)

| symbol | key of trainer.grpo.objective |
|---|---|
| 1 - eps_low, the smallest weight | ratio_min, 0: none, as in the paper |
| 1 + eps_high, the largest | ratio_max, 5: the paper gives no number; ScaleRL (arXiv 2510.13786) takes 4 to 8 |

TRL's `epsilon_high` of its cispo is ratio_max itself. Token level, group advantages. rho is exactly 1 where one optimizer step
follows a batch, so log-probabilities of the policy that sampled need no pass of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.kl import bounded_exp
from megatron_ext.losses.objective import Objective, PolicyTokens

__all__ = ["Cispo"]


@dataclass(frozen=True, kw_only=True)
class Cispo(Objective):
    """See the module."""

    # The smallest and the largest weight of a token.
    ratio_min: float = 0.0
    ratio_max: float = 5.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ratio_min <= 1 <= self.ratio_max < math.inf:
            raise UserError(
                f"ratio_min={self.ratio_min} must lie in [0, 1], and ratio_max={self.ratio_max} be finite and at least 1, the "
                "weight of a token that has not moved"
            )

    def policy_loss(self, tokens: PolicyTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.policy_loss`. "clip_fraction": the share of tokens whose weight was bounded."""
        ratio, weights = bounded_exp(tokens.log_ratio.detach()), tokens.weights
        kept = ratio.clamp(self.ratio_min, self.ratio_max)
        metrics = {"ratio": (weights * ratio).sum(), "clip_fraction": (weights * (ratio != kept)).sum()}
        return -kept * tokens.advantages * tokens.logprobs, metrics
