"""GPG: the plain policy gradient of groups.

Source: Group Policy Gradient (arXiv 2504.02546):

    l_i = -A_i log pi(y_i)

Token level; advantages `gpg`: what the groups that differ say counts for those that do not. There is no ratio:
log-probabilities of the policy that sampled are only measured, and where several optimizer steps follow a batch the later ones
are off-policy with nothing to make up for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_ext.losses.kl import bounded_exp
from megatron_ext.losses.objective import Objective, PolicyTokens

__all__ = ["Gpg"]


@dataclass(frozen=True, kw_only=True)
class Gpg(Objective):
    """See the module."""

    advantages: str | dict[str, Any] = "gpg"

    def policy_loss(self, tokens: PolicyTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.policy_loss`."""
        ratio = bounded_exp(tokens.log_ratio.detach())
        return -tokens.advantages * tokens.logprobs, {"ratio": (tokens.weights * ratio).sum()}
