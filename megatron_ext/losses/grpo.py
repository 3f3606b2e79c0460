"""The GRPO objective as pure functions of tensors.

Source: Group Relative Policy Optimization, DeepSeekMath (arXiv 2402.03300), eq. 3; KL estimators k1, k2, k3 after
Schulman, "Approximating KL divergence" (2020); token-level normalisation and asymmetric clipping after DAPO (arXiv
2503.14476); sequence-level ratios after GSPO (arXiv 2507.18071).

    loss = sum_i w_i [ -min(rho_i A_i, clip(rho_i, 1 - eps_min, 1 + eps_max) A_i) + beta KL_i ]

| symbol | here | configuration key |
|---|---|---|
| rho_i = pi(y_i) / pi_old(y_i) | exp(logprobs - old_logprobs) | trainer.grpo.sequence_level_importance_ratios |
| A_i | advantages[response of i] | trainer.grpo.normalize_rewards, use_leave_one_out_baseline |
| eps_min, eps_max | ratio_clip_min, ratio_clip_max | trainer.grpo.ratio_eps, or ratio_clip_min/ratio_clip_max |
| beta | kl_penalty | trainer.grpo.initial_policy_kl_penalty |
| KL_i | kl_type k1, k2 or k3 | trainer.grpo.reference_policy_kl_type |
| w_i | weights, from `token_weights` | trainer.grpo.token_level_loss |

The weights carry the GLOBAL normaliser, so the losses of microbatches and data-parallel ranks add up to the loss of the
whole batch, however it was cut.

Shape legend: r predicted response tokens, k responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError

__all__ = ["GrpoTerms", "group_advantages", "groups_with_signal", "grpo_loss", "kl_estimate", "token_weights"]

KL_TYPES = ("k1", "k2", "k3")
# Ratios beyond e^20 are clipped anyway, but their overflow would turn a gradient of 0 into NaN.
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class GrpoTerms:
    """Coefficients of the objective; see the module's table for the configuration keys."""

    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    kl_penalty: float = 0.0
    kl_type: str = "k3"
    sequence_level_ratios: bool = False
    entropy_bonus: float = 0.0

    def __post_init__(self):
        if self.kl_type not in KL_TYPES:
            raise UserError(f"reference_policy_kl_type must be one of {', '.join(KL_TYPES)}, got {self.kl_type!r}")
        if not 0 <= self.ratio_clip_min < 1 or self.ratio_clip_max < 0:
            raise UserError(
                f"ratio_clip_min={self.ratio_clip_min} must lie in [0, 1) and ratio_clip_max={self.ratio_clip_max} "
                "must not be negative"
            )


def group_advantages(rewards: Tensor, normalize: bool = True, leave_one_out: bool = False) -> Tensor:
    """Group-relative advantages.

    Args:
        rewards: [prompts, samples_per_prompt], finite.
        normalize: divide by the group's standard deviation (eq. 3 of DeepSeekMath); a group whose rewards are all
            equal gets zero.
        leave_one_out: the baseline of a response is the mean of the OTHERS of its group (RLOO, arXiv 2402.14740).

    Returns:
        [prompts, samples_per_prompt] in the dtype of `rewards`.
    """
    prompts, samples = rewards.shape
    baseline = rewards.mean(1, keepdim=True)
    if leave_one_out:
        if samples < 2:
            raise UserError("use_leave_one_out_baseline needs samples_per_prompt of at least 2")
        baseline = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
    advantages = rewards - baseline
    if normalize and samples > 1:
        # Not std > 0: equal rewards need not average to themselves, and std is then rounding noise.
        std = rewards.std(1, keepdim=True)
        signal = groups_with_signal(rewards).unsqueeze(1)
        advantages = torch.where(signal, advantages / (std + 1e-6), torch.zeros_like(advantages))
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


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference), [r]: k1 = log(p/q), k2 = k1^2 / 2, k3 = q/p - 1 + log(p/q)."""
    log_ratio = logprobs - reference
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-_bounded(log_ratio)) + log_ratio


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    terms: GrpoTerms,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    response_ids: Tensor | None = None,
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

    Returns:
        (scalar loss, metrics). Metrics are weighted sums, so they add up over microbatches and ranks as the loss does.
    """
    log_ratio = logprobs - old_logprobs
    if terms.sequence_level_ratios:
        log_ratio = _sequence_log_ratio(log_ratio, weights, response_ids)
    ratio = _bounded(log_ratio).exp()
    clipped = ratio.clamp(1 - terms.ratio_clip_min, 1 + terms.ratio_clip_max)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    metrics = {
        "ratio": (weights * ratio).sum(),
        "clip_fraction": (weights * (ratio * advantages > clipped * advantages)).sum(),
    }
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, ref_logprobs, terms.kl_type)
        metrics["kl"] = (weights * kl).sum()
        if terms.kl_penalty:
            per_token = per_token + terms.kl_penalty * kl
    elif terms.kl_penalty:
        raise UserError(f"initial_policy_kl_penalty={terms.kl_penalty} needs the reference policy's log-probabilities")
    if entropy is not None:
        metrics["entropy"] = (weights * entropy).sum()
        if terms.entropy_bonus:
            per_token = per_token - terms.entropy_bonus * entropy
    loss = (weights * per_token).sum()
    metrics["loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def _sequence_log_ratio(log_ratio: Tensor, weights: Tensor, response_ids: Tensor) -> Tensor:
    """GSPO, eq. 7: every token of a response gets the response's mean log ratio."""
    counts = (weights > 0).float()
    num = int(response_ids.max()) + 1 if response_ids.numel() else 0
    mean = _sum_by_response(log_ratio * counts, response_ids, num) / _sum_by_response(counts, response_ids, num).clamp(
        min=1
    )
    return mean[response_ids]


def _sum_by_response(values: Tensor, response_ids: Tensor, num_responses: int) -> Tensor:
    """Sum of [r] values per response, [k]."""
    return values.new_zeros(num_responses).index_add(0, response_ids, values)
