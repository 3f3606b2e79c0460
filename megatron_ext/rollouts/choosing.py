"""One token for every row of logits, and its log-probability, from one softmax.

Shape legend: r rows, v vocabulary, s tokens that a row has seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_ext.rollouts.requests import SamplingParams

__all__ = ["choose_tokens", "penalized"]


def choose_tokens(
    logits: Tensor, params: SamplingParams, uniform: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverting the cumulative distribution.

    Args:
        logits: fp32 [r, v].
        uniform: fp64 [r] in [0, 1).
        seen: int64 [r, s], for a repetition penalty: the tokens of each row's prompt and response, repeated to fill the row.

    Returns:
        tokens int64 [r], and their log-probabilities fp32 [r] at the temperature, before penalty and filters: those of the
        distribution that is trained.
    """
    scaled = logits if params.temperature == 1 else logits / params.temperature
    shaped = scaled
    if params.repetition_penalty != 1:
        shaped = penalized(logits, params.repetition_penalty, seen) / params.temperature
    if params.use_greedy:
        tokens = shaped.argmax(-1)
        return tokens, _logprobs(scaled, tokens.unsqueeze(1))
    filtered = _filtered(shaped, params)
    cumulative = filtered.double().softmax(-1).cumsum_(-1)
    total = cumulative[:, -1:]
    # Below the total, whatever is rounded: the token that is reached has a share.
    point = torch.minimum(uniform.to(logits.device).unsqueeze(1) * total, total.nextafter(torch.zeros_like(total)))
    # A row that is not finite reaches none: it has the last token, whose log-probability is NaN, for the caller to see.
    tokens = torch.searchsorted(cumulative, point, right=True).clamp_(max=logits.size(1) - 1)
    if filtered is not scaled:
        return tokens.squeeze(1), _logprobs(scaled, tokens)
    before = cumulative.gather(1, (tokens - 1).clamp_(min=0)).masked_fill_(tokens == 0, 0)
    return tokens.squeeze(1), (cumulative.gather(1, tokens) - before).log_().squeeze(1).float()


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """fp32 [r] of tokens [r, 1]."""
    return logits.log_softmax(-1).gather(1, tokens).squeeze(1)


def penalized(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Logits of tokens that a row has seen, divided by the penalty where positive and multiplied where negative."""
    found = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(found < 0, found * penalty, found / penalty))


def _filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """-inf for the tokens that top_k, top_p and min_p leave out; the likeliest always stays."""
    if 0 < params.top_k < logits.size(1):
        threshold = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        outside = probability.cumsum(-1) - probability >= params.top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    if params.min_p > 0:
        least = logits.amax(-1, keepdim=True) + math.log(params.min_p)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return logits
