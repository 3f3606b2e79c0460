"""How far a sampler is from the trainer, and weights that make up for it.

Another engine, or weights of some steps ago, sample from a distribution that is not quite the policy that the objective takes to
have sampled. With d_i = log(pi_old / pi_sampler) of token i, where pi_old is the trainer's policy before the update, the mean
over the sampler's tokens of f(i) exp(d_i) is that over the trainer's; the weight is a bounded form of exp(d)
(keys of `trainer.grpo.off_policy`):

| level | x | bias |
|---|---|---|
| token | d_i | the contexts remain the sampler's |
| sequence | sum of d over the response | none before bounding; its variance grows with the length |
| geometric | mean of d over the response | of token's kind; steadier for long responses |

| form | weight | source |
|---|---|---|
| truncate | min(e^x, high) | IMPALA, arXiv 1802.01561; for engines that differ, F. Yao et al., "Off-policy RL training", 2025 |
| mask | e^x where low <= e^x <= high, else 0 | IcePop, in arXiv 2510.18855 |

Weights have no gradient. A token that is masked still counts in the normaliser: its 0 is part of the mean. A response that is
rejected is no sample of anything near the policy and does not count at all, so `rejected_responses` is asked before weights are
made.

Shape legend: r predicted response tokens, k responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.kl import bounded_exp, k3

__all__ = ["OffPolicyTerms", "effective_share", "mismatch", "off_policy_weights", "rejected_responses"]

LEVELS = ("token", "sequence", "geometric")
FORMS = ("truncate", "mask")


@dataclass(frozen=True)
class OffPolicyTerms:
    """How the weights are made; see the module's tables."""

    level: str = "token"
    form: str = "truncate"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self):
        if self.level not in LEVELS:
            raise UserError(f"level must be one of {', '.join(LEVELS)}, got {self.level!r}")
        if self.form not in FORMS:
            raise UserError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if not 1 <= self.high < math.inf:
            raise UserError(
                f"high={self.high} must be finite and at least 1, the weight of a token that both see alike"
            )
        if not 0 <= self.low <= 1:
            raise UserError(f"low={self.low} must lie in [0, 1], the weight of a token that both see alike")


@torch.no_grad()
def off_policy_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    weights: Tensor,
    response_ids: Tensor,
    num_responses: int,
    terms: OffPolicyTerms,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What each token's term of the objective is multiplied by.

    Args:
        old_logprobs: [r], the trainer's, before the update.
        sampler_logprobs: [r], as the sampler had them, at the same temperature; NaN where that is not known, and taken to be the
            trainer's.
        weights: [r] from `token_weights`; where it is 0 a token does not count, here neither.
        response_ids: int64 [r], in [0, num_responses).

    Returns:
        ([r], metrics). Metrics are weighted sums that add up over microbatches and ranks as the loss does: "importance_bounded",
        the share of tokens whose weight was bounded; "importance" and "importance_squared", for `effective_share`.
    """
    counts = weights > 0
    d = _distance(old_logprobs, sampler_logprobs, counts)
    x = d if terms.level == "token" else _of_response(d, counts, response_ids, num_responses, terms.level)
    ratio = bounded_exp(x)
    bounded = ratio > terms.high
    if terms.form == "mask":
        bounded = bounded | (ratio < terms.low)
        kept = torch.where(bounded, 0, ratio)
    else:
        kept = ratio.clamp(max=terms.high)
    metrics = {
        "importance_bounded": (weights * bounded).sum(),
        "importance": (weights * ratio).sum(),
        "importance_squared": (weights * ratio.square()).sum(),
    }
    return kept, metrics


@torch.no_grad()
def mismatch(old_logprobs: Tensor, sampler_logprobs: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """How far they are from each other over the tokens that count, [r] each; weighted sums that add up as the loss does.

    Returns:
        "sampler_logprob_diff", the mean of |d|; "sampler_kl", an estimate of KL(sampler, old), never negative;
        "sampler_logprob_diff_max", the largest |d|, of which the largest counts.
    """
    d = _distance(old_logprobs, sampler_logprobs, weights > 0)
    return {
        "sampler_logprob_diff": (weights * d.abs()).sum(),
        "sampler_kl": (weights * k3(-d)).sum(),
        "sampler_logprob_diff_max": d.abs().amax() if len(d) else d.new_zeros(()),
    }


@torch.no_grad()
def rejected_responses(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    counts: Tensor,
    response_ids: Tensor,
    num_responses: int,
    above: float,
) -> Tensor:
    """bool [k]: responses with a token that counts whose |d|, in nats, is above a bound. counts: bool [r]; the rest as in
    `off_policy_weights`."""
    d = _distance(old_logprobs, sampler_logprobs, counts)
    return d.new_zeros(num_responses).scatter_reduce(0, response_ids, d.abs(), "amax") > above


def effective_share(importance: float, importance_squared: float) -> float:
    """Kish's effective sample size over the number of samples, from the sums of all ranks: 1 where all weigh alike."""
    return importance**2 / importance_squared if importance_squared else 1.0


def _distance(old_logprobs: Tensor, sampler_logprobs: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts & ~sampler_logprobs.isnan(), old_logprobs - sampler_logprobs, 0)


def _of_response(d: Tensor, counts: Tensor, response_ids: Tensor, num_responses: int, level: str) -> Tensor:
    """[r]: of each token's response, the sum or the mean of d."""
    total = d.new_zeros(num_responses).index_add(0, response_ids, d)
    if level == "geometric":
        number = d.new_zeros(num_responses).index_add(0, response_ids, counts.to(d))
        total = total / number.clamp(min=1)
    return total[response_ids]
