"""KL(policy || reference) from sampled tokens: estimates, and penalties whose gradients are closed forms.

Source: Schulman, "Approximating KL divergence" (2020), for k1, k2, k3; DeepSeek-V3.2 (arXiv 2512.02556) for k3 weighted by
the ratio. With d = log(policy / reference) of a sampled token and rho = policy / policy that sampled it:

| penalty | reference_policy_kl_type and other keys of trainer.grpo | value | derivative by log policy | mean of the gradient |
|---|---|---|---|---|
| k1 in the reward | k1, use_kl_in_reward: true | d | d, as an advantage | that of KL(policy, reference) while rho = 1 |
| k2 | k2 | d^2 / 2 | d | that of KL(policy, reference) while rho = 1 |
| k3 | k3 | e^-d - 1 + d | 1 - e^-d | that of KL(reference, policy) while rho = 1 |
| rho k3 | k3, use_bias_correction_kl: true | rho (e^-d - 1 + d) | rho d | that of KL(policy, reference) |

In the reward d is the one of the policy that sampled, as the reward is, and clipping stops it as it stops the reward. KL and
its gradient are those of the next token at the contexts that were sampled: what a token does to the divergence of later
ones is left out. k1 in the loss has the derivative 1 whatever d is, whose mean is 0; k2 and k3 in the reward have gradients
whose mean vanishes to first order near the reference. Neither is offered.

Precision: derivatives are written down rather than left to autograd, which would take differences of exponentials.
Exponents stop at a quarter of the largest one, 22.2 in fp32 and 177.4 in fp64: below d = -22.2 the derivative of k3 stays
at -e^22.2, of the right sign, and above log rho = 22.2 so does rho. d itself has no bound.

Shape legend: r predicted response tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["KL_TYPES", "bounded_exp", "k3", "kl_in_loss", "kl_in_reward", "weighted_k3", "with_derivative"]

KL_TYPES = ("k1", "k2", "k3")


def bounded_exp(x: Tensor) -> Tensor:
    """e^x; beyond the bound (see above) both value and derivative stay at it, so that a gradient keeps its sign."""
    value = _bounded_above(x.detach()).exp()
    return with_derivative(value, value, x)


def k3(d: Tensor) -> Tensor:
    """e^-d - 1 + d: never negative, and 0 at d = 0 alone. Its derivative is 1 - e^-d."""
    at = d.detach()
    excess = torch.expm1(_bounded_above(-at))
    return with_derivative(excess + at, -excess, d)


def weighted_k3(d: Tensor, log_ratio: Tensor) -> Tensor:
    """rho k3(d), whose mean over the tokens of any policy is the divergence.

    Args:
        d: [r], log(policy / reference).
        log_ratio: [r], log(policy / policy that sampled), of each token.

    Returns:
        [r], with the derivative rho d by log policy, which moves both arguments: rho k3 + rho (1 - e^-d), where e^-d cancels.
    """
    at, ratio = d.detach(), bounded_exp(log_ratio.detach())
    return with_derivative(ratio * k3(at), ratio * at, d)


def kl_in_loss(kind: str, d: Tensor, log_ratio: Tensor, weighted: bool) -> Tensor:
    """The penalty [r] that a loss adds.

    Args:
        kind: "k2" or "k3".
        d, log_ratio: see `weighted_k3`.
        weighted: k3 alone, times rho.
    """
    if kind == "k2":
        return d.square() / 2
    return weighted_k3(d, log_ratio) if weighted else k3(d)


def kl_in_reward(old_logprobs: Tensor, reference: Tensor) -> Tensor:
    """The penalty [r] that advantages lose: k1 of the policy that sampled, without gradient."""
    return (old_logprobs - reference).detach()


def _bounded_above(x: Tensor) -> Tensor:
    """A quarter of the largest exponent leaves room for a product of two, or for the square in a gradient's norm."""
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) / 4)


def with_derivative(value: Tensor, derivative: Tensor, x: Tensor) -> Tensor:
    """`value`, with `derivative` by x; both come without gradient."""
    return value + derivative * (x - x.detach())
