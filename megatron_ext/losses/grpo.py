"""The loss of GRPO and its kin as a pure function of tensors: an objective, a KL penalty and an entropy bonus.

    loss = sum_i w_i [ m_i l_i + beta KL_i - eta H_i ]

| symbol | here | configuration key |
|---|---|---|
| l_i | objective, of `megatron_ext.losses.registry` | trainer.grpo.objective |
| m_i | kept, of `megatron_ext.losses.high_entropy`; else 1 | trainer.grpo.high_entropy_share |
| A_i in it | advantages[response of i] | trainer.grpo.objective.advantages |
| beta | kl_penalty | trainer.grpo.initial_policy_kl_penalty |
| KL_i | kl_type, kl_weighted, see `megatron_ext.losses.kl` | trainer.grpo.reference_policy_kl_type, use_bias_correction_kl |
| A_i - beta KL_i, and no KL_i in the sum | kl_in_reward | trainer.grpo.use_kl_in_reward |
| eta, H_i | entropy_bonus, entropy | trainer.grpo.entropy_bonus |
| w_i | weights, from `token_weights`, times `importance` | trainer.grpo.objective.normalisation, trainer.grpo.off_policy |

The weights carry the GLOBAL normaliser, so the losses of microbatches and data-parallel ranks add up to the loss of the
whole batch, however it was cut.

Shape legend: r predicted response tokens, k responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.clipped import Grpo
from megatron_ext.losses.kl import KL_TYPES, kl_in_loss, kl_in_reward, weighted_k3
from megatron_ext.losses.objective import Objective, PolicyTokens

__all__ = ["GrpoTerms", "grpo_loss"]


@dataclass(frozen=True)
class GrpoTerms:
    """What the loss is made of; see the module's table for the configuration keys."""

    objective: Objective = field(default_factory=Grpo)
    kl_penalty: float = 0.0
    kl_type: str = "k3"
    kl_in_reward: bool = False
    kl_weighted: bool = False
    entropy_bonus: float = 0.0

    def __post_init__(self):
        if not math.isfinite(self.entropy_bonus):
            raise UserError(f"entropy_bonus={self.entropy_bonus} must be finite")
        if not 0 <= self.kl_penalty < math.inf:
            raise UserError(f"initial_policy_kl_penalty={self.kl_penalty} must be finite and not negative")
        self._check_kl_form()

    def _check_kl_form(self) -> None:
        """Only forms that pull the policy to the reference, see `megatron_ext.losses.kl`."""
        if self.kl_type not in KL_TYPES:
            raise UserError(f"reference_policy_kl_type must be one of {', '.join(KL_TYPES)}, got {self.kl_type!r}")
        for key, on in (("use_kl_in_reward", self.kl_in_reward), ("use_bias_correction_kl", self.kl_weighted)):
            if on and not self.kl_penalty:
                raise UserError(
                    f"{key}=true has no effect while initial_policy_kl_penalty=0: set one of them otherwise"
                )
        if self.kl_in_reward and self.kl_type != "k1":
            raise UserError(
                f"use_kl_in_reward=true needs reference_policy_kl_type=k1, got {self.kl_type}, which as a reward does not "
                "pull the policy to the reference"
            )
        if self.kl_type == "k1" and self.kl_penalty and not self.kl_in_reward:
            raise UserError(
                "reference_policy_kl_type=k1 in the loss has no effect, because its gradient is 0 on average: set "
                "use_kl_in_reward=true, or reference_policy_kl_type=k2 or k3"
            )
        if self.kl_weighted and self.kl_type != "k3":
            raise UserError(
                f"use_bias_correction_kl=true weighs k3 in the loss, but reference_policy_kl_type={self.kl_type}: set k3, "
                "or use_bias_correction_kl=false"
            )


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    terms: GrpoTerms,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    response_ids: Tensor | None = None,
    num_responses: int | None = None,
    importance: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, already normalised by `weights`.

    Args:
        logprobs: [r], of the policy being trained.
        old_logprobs: [r], of the policy that sampled, no gradient.
        advantages: [r], the advantage of each token's response.
        weights: [r] from `token_weights`; 0 where a token does not count.
        ref_logprobs: [r], needed where `terms.kl_penalty` is not 0.
        entropy: [r], needed where `terms.entropy_bonus` is not 0.
        response_ids, num_responses: see `PolicyTokens`; needed where the objective's ratios are those of whole responses.
        importance: [r] of `off_policy_weights`, multiplies every token's term; metrics but "loss" are those without it.
        kept: bool [r], of `high_entropy_tokens`: tokens whose term the objective keeps; None: all.

    Returns:
        (scalar loss, metrics). Metrics are weighted sums, so they add up over microbatches and ranks as the loss does. "kl"
        is the ratio-weighted k3 whatever form the penalty has: its mean is KL(policy, reference), after updates too.

    Raises:
        UserError: a term whose coefficient is not 0 lacks what it is made of.
    """
    if terms.kl_penalty and ref_logprobs is None:
        raise UserError(f"initial_policy_kl_penalty={terms.kl_penalty} needs the reference policy's log-probabilities")
    if terms.entropy_bonus and entropy is None:
        raise UserError(f"entropy_bonus={terms.entropy_bonus} needs the entropies")
    if terms.kl_in_reward:
        advantages = advantages - terms.kl_penalty * kl_in_reward(old_logprobs, ref_logprobs)
    tokens = PolicyTokens(logprobs, old_logprobs, advantages, weights, response_ids, num_responses)
    per_token, metrics = terms.objective.policy_loss(tokens)
    if kept is not None:
        per_token = torch.where(kept, per_token, 0)
        metrics["high_entropy"] = (weights * kept).sum()
    if ref_logprobs is not None:
        d = logprobs - ref_logprobs
        metrics["kl"] = (weights * weighted_k3(d, tokens.log_ratio)).sum()
        if terms.kl_penalty and not terms.kl_in_reward:
            per_token = per_token + terms.kl_penalty * kl_in_loss(terms.kl_type, d, tokens.log_ratio, terms.kl_weighted)
    if entropy is not None:
        metrics["entropy"] = (weights * entropy).sum()
        if terms.entropy_bonus:
            per_token = per_token - terms.entropy_bonus * entropy
    loss = (weights * per_token).sum() if importance is None else (weights * importance * per_token).sum()
    metrics["loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}
