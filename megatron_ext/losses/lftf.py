"""What LFTF minimises: an attribute pair's next-token probabilities pulled together, the rest of the model kept.

LFTF (arXiv 2505.15475) calls its loss "carefully designed" without stating it in the abstract; a third-party
re-implementation minimises P(he) + P(she). The losses here are ours, `sum` apart, which is that one and is here for
comparison: it reaches a perfect AFGB by never saying a pronoun.

"he" stands for the pair's first word and "she" for its second. Shape legend: n prompts, r tokens of text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.kl import k3

__all__ = ["BIAS_LOSSES", "LOSSES", "kept_text_loss", "loss_weights", "pair_loss"]

# Of prompts that hint at neither word; `hint` is for prompts that do, `kl` for text.
BIAS_LOSSES = ("abs_diff", "balanced", "sum")
LOSSES = (*BIAS_LOSSES, "hint", "kl")


def loss_weights(choice: str) -> dict[str, float]:
    """Weights by name, from "balanced", "balanced+hint" or "balanced+hint+0.5*kl".

    Raises:
        UserError: an unknown or repeated name, no bias loss among them, or a weight that is not positive.
    """
    weights: dict[str, float] = {}
    for term in choice.split("+"):
        factor, star, name = (part.strip() for part in term.rpartition("*"))
        if name not in LOSSES or name in weights:
            problem = "is named twice" if name in weights else f"does not exist; there are: {', '.join(LOSSES)}"
            raise UserError(f"loss {name!r} in {choice!r} {problem}")
        try:
            weights[name] = float(factor) if star else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise UserError(f"the weight of {name} in {choice!r} must be a positive number, got {factor!r}")
    if not any(name in BIAS_LOSSES for name in weights):
        raise UserError(f"one of {', '.join(BIAS_LOSSES)} must be among the losses, got {choice!r}")
    return weights


def pair_loss(name: str, log_he: Tensor, log_she: Tensor, frozen: Tensor) -> Tensor:
    """One loss per prompt.

    - abs_diff: |P(he) - P(she)|, the AFGB itself.
    - balanced: KL from the target {m/2, m/2, 1 - m} to {P(he), P(she), rest}, where m is P(he) + P(she) of the frozen
      model: equal shares of the mass that was there. 0 where reached.
    - sum: P(he) + P(she).
    - hint: KL from the frozen {P(he), P(she), rest} to the model's: the answer stays.

    The rest is 1 - P(he) - P(she): where less than one rounding is left of it (1.2e-7 in fp32), nothing pulls it up.

    Args:
        log_he, log_she: log-probabilities [n].
        frozen: probabilities [n, 2] of both words before training.

    Returns:
        [n].
    """
    if name == "abs_diff":
        return (log_he.exp() - log_she.exp()).abs()
    if name == "sum":
        return log_he.exp() + log_she.exp()
    if name == "balanced":
        frozen = frozen.mean(1, keepdim=True).expand(-1, 2)
    elif name != "hint":
        raise UserError(f"loss {name!r} does not exist; there are: {', '.join(LOSSES)}")
    return _three_way_kl(frozen.to(log_he), log_he, log_she)


def _three_way_kl(target: Tensor, log_he: Tensor, log_she: Tensor) -> Tensor:
    """KL(target || model) over he, she and everything else, [n]."""
    tiny = torch.finfo(log_he.dtype).eps
    rest = torch.log((1 - log_he.exp() - log_she.exp()).clamp_min(tiny))
    model = torch.stack((log_he, log_she, rest))  # [3, n]
    wanted = torch.stack((*target.unbind(1), (1 - target.sum(1)).clamp_min(0)))
    return (torch.special.xlogy(wanted, wanted) - wanted * model).sum(0)


def kept_text_loss(logprobs: Tensor, frozen: Tensor) -> Tensor:
    """How far the likelihood of text has moved, per token [r]: x - 1 - log x with x = P / P_frozen of the token.

    Never negative, 0 only at x = 1; where the text is what the frozen model would write, its mean estimates
    KL(frozen || model) without bias.
    """
    return k3(frozen.to(logprobs) - logprobs)
