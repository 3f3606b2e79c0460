"""The GRPO objective as pure functions of tensors.

Source: Group Relative Policy Optimization, DeepSeekMath (arXiv 2402.03300), eq. 3; the KL term in `megatron_ext.losses.kl`;
token-level normalisation and asymmetric clipping after DAPO (arXiv 2503.14476); sequence-level ratios after GSPO (arXiv
2507.18071).

    loss = sum_i w_i [ -min(rho_i A_i, clip(rho_i, 1 - eps_min, 1 + eps_max) A_i) + beta KL_i - eta H_i ]

| symbol | here | configuration key |
|---|---|---|
| rho_i = pi(y_i) / pi_old(y_i) | exp(logprobs - old_logprobs) | trainer.grpo.sequence_level_importance_ratios |
| A_i | advantages[response of i] | trainer.grpo.normalize_rewards, use_leave_one_out_baseline |
| eps_min, eps_max | ratio_clip_min, ratio_clip_max | trainer.grpo.ratio_eps, or ratio_clip_min/ratio_clip_max |
| beta | kl_penalty | trainer.grpo.initial_policy_kl_penalty |
| KL_i | kl_type, kl_weighted | trainer.grpo.reference_policy_kl_type, use_bias_correction_kl |
| A_i - beta KL_i, and no KL_i in the sum | kl_in_reward | trainer.grpo.use_kl_in_reward |
| eta, H_i | entropy_bonus, entropy | trainer.grpo.entropy_bonus |
| w_i | weights, from `token_weights`, times `importance` | trainer.grpo.token_level_loss, off_policy |

The weights carry the GLOBAL normaliser, so the losses of microbatches and data-parallel ranks add up to the loss of the
whole batch, however it was cut.

Shape legend: r predicted response tokens, k responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.kl import KL_TYPES, bounded_exp, kl_in_loss, kl_in_reward, weighted_k3

__all__ = ["GrpoTerms", "group_advantages", "groups_with_signal", "grpo_loss", "token_weights"]


@dataclass(frozen=True)
class GrpoTerms:
    """Coefficients of the objective; see the module's table for the configuration keys."""

    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    kl_penalty: float = 0.0
    kl_type: str = "k3"
    kl_in_reward: bool = False
    kl_weighted: bool = False
    sequence_level_ratios: bool = False
    entropy_bonus: float = 0.0

    def __post_init__(self):
        if not 0 <= self.ratio_clip_min < 1 or not self.ratio_clip_max >= 0:
            raise UserError(
                f"ratio_clip_min={self.ratio_clip_min} must lie in [0, 1) and ratio_clip_max={self.ratio_clip_max} "
                "must not be negative"
            )
        if self.ratio_clip_min >= 0.5 and self.ratio_clip_max >= 1:
            raise UserError(
                f"ratio_clip_min={self.ratio_clip_min} and ratio_clip_max={self.ratio_clip_max} look like the bounds of the "
                f"ratio: they are its distances from 1, so give {1 - self.ratio_clip_min:.4g} and {self.ratio_clip_max - 1:.4g}"
            )
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


def group_advantages(rewards: Tensor, normalize: bool = True, leave_one_out: bool = False) -> Tensor:
    """Group-relative advantages.

    Args:
        rewards: [prompts, samples_per_prompt], finite; in fp64, because fp32 holds integers up to 2^24 only.
        normalize: divide by the group's standard deviation (eq. 3 of DeepSeekMath) plus 1e-6; a group whose rewards are
            all equal gets zero.
        leave_one_out: the baseline of a response is the mean of the OTHERS of its group (RLOO, arXiv 2402.14740).

    Returns:
        [prompts, samples_per_prompt], fp64.
    """
    samples = rewards.size(1)
    # Counted from the group's smallest: differences of large rewards are exact, and those of equal ones exactly 0.
    rewards = rewards.double()
    rewards = rewards - rewards.amin(1, keepdim=True)
    baseline = rewards.mean(1, keepdim=True)
    if leave_one_out:
        if samples < 2:
            raise UserError("use_leave_one_out_baseline needs samples_per_prompt of at least 2")
        baseline = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
    advantages = rewards - baseline
    if normalize and samples > 1:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    return advantages


def groups_with_signal(rewards: Tensor) -> Tensor:
    """bool [prompts]: whether the rewards [prompts, samples] of a group differ; a group of equal ones teaches nothing."""
    return rewards.amax(1) > rewards.amin(1)


def token_weights(
    response_ids: Tensor, mask: Tensor, num_responses: int, global_tokens: float, global_responses: float, level: str
) -> Tensor:
    """w [r] fp32: the weight of each token in the loss.

    level "token": 1 / (masked tokens of the GLOBAL batch). level "sequence": 1 / (masked tokens of the own response x
    responses with a masked token in the GLOBAL batch).

    Args:
        response_ids: int64 [r], response of each token within this microbatch.
        mask: bool [r], tokens that count.
        num_responses: k, responses of this microbatch.
        global_tokens, global_responses: totals over all microbatches and data-parallel ranks.
    """
    if level == "token":
        return mask.float() / max(global_tokens, 1)
    if level != "sequence":
        raise UserError(f"normalisation level must be 'token' or 'sequence', got {level!r}")
    lengths = _sum_by_response(mask.float(), response_ids, num_responses)
    return mask.float() / (lengths.clamp(min=1)[response_ids] * max(global_responses, 1))


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective, already normalised by `weights`.

    Args:
        logprobs: [r], of the policy being trained.
        old_logprobs: [r], of the policy that sampled, no gradient.
        advantages: [r], the advantage of each token's response.
        weights: [r] from `token_weights`; 0 where a token does not count.
        ref_logprobs: [r], needed where `terms.kl_penalty` is not 0.
        entropy: [r], needed where `terms.entropy_bonus` is not 0.
        response_ids: int64 [r], needed for sequence-level ratios.
        num_responses: k, needed for them, too: on a GPU the host would have to wait for the largest id.
        importance: [r] of `off_policy_weights`, multiplies every token's term; metrics but "loss" are those without it.

    Returns:
        (scalar loss, metrics). Metrics are weighted sums, so they add up over microbatches and ranks as the loss does. "kl"
        is the ratio-weighted k3 whatever form the penalty has: its mean is KL(policy, reference), after updates too.

    Raises:
        UserError: a term whose coefficient is not 0 lacks what it is made of.
    """
    token_log_ratio = log_ratio = logprobs - old_logprobs
    if terms.sequence_level_ratios:
        if response_ids is None or num_responses is None:
            raise UserError("sequence_level_importance_ratios=true needs response_ids and num_responses")
        log_ratio = _sequence_log_ratio(log_ratio, weights, response_ids, num_responses)
    if terms.kl_penalty and ref_logprobs is None:
        raise UserError(f"initial_policy_kl_penalty={terms.kl_penalty} needs the reference policy's log-probabilities")
    if terms.entropy_bonus and entropy is None:
        raise UserError(f"entropy_bonus={terms.entropy_bonus} needs the entropies")
    if terms.kl_in_reward:
        advantages = advantages - terms.kl_penalty * kl_in_reward(old_logprobs, ref_logprobs)
    ratio = bounded_exp(log_ratio)
    clipped = ratio.clamp(1 - terms.ratio_clip_min, 1 + terms.ratio_clip_max)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    metrics = {
        "ratio": (weights * ratio).sum(),
        "clip_fraction": (weights * (ratio * advantages > clipped * advantages)).sum(),
    }
    if ref_logprobs is not None:
        d = logprobs - ref_logprobs
        metrics["kl"] = (weights * weighted_k3(d, token_log_ratio)).sum()
        if terms.kl_penalty and not terms.kl_in_reward:
            per_token = per_token + terms.kl_penalty * kl_in_loss(terms.kl_type, d, token_log_ratio, terms.kl_weighted)
    if entropy is not None:
        metrics["entropy"] = (weights * entropy).sum()
        if terms.entropy_bonus:
            per_token = per_token - terms.entropy_bonus * entropy
    loss = (weights * per_token).sum() if importance is None else (weights * importance * per_token).sum()
    metrics["loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def _sequence_log_ratio(log_ratio: Tensor, weights: Tensor, response_ids: Tensor, num_responses: int) -> Tensor:
    """Every token of a response gets the response's mean log ratio, and its own gradient.

    This is GSPO-token (section 4.3): where a response's tokens have one advantage and one weight it is GSPO, gradient
    included, and it stays well defined where the penalty in the reward gives each token an advantage of its own.
    """
    counts, values = (weights > 0).to(log_ratio), log_ratio.detach()
    total, count = (_sum_by_response(x, response_ids, num_responses) for x in (values * counts, counts))
    return (total / count.clamp(min=1))[response_ids] + (log_ratio - values)


def _sum_by_response(values: Tensor, response_ids: Tensor, num_responses: int) -> Tensor:
    """Sum of [r] values per response, [k]."""
    return values.new_zeros(num_responses).index_add(0, response_ids, values)
