"""The tokens of highest entropy, which alone an objective may train.

Source: "Beyond the 80/20 Rule" (arXiv 2506.01939), section 5: of the tokens of a batch the share rho with the highest entropy,
where the policy decides which way to go, gives all of the gradient; the weights of tokens stay what they are. The KL penalty
and the entropy bonus still act on every token.

| symbol | key |
|---|---|
| rho | trainer.grpo.high_entropy_share |

Entropies are those of the policy that sampled, and the threshold is that of the whole batch of an optimizer step, so that it
does not depend on how the batch is cut. TRL takes a microbatch's, of the policy that is trained.

Shape legend: r predicted response tokens of a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["high_entropy_tokens"]

PARTS = 1_000_000  # a share is counted in


def high_entropy_tokens(
    entropies: Sequence[Tensor],
    counts: Sequence[Tensor],
    share: float,
    add: Callable[[Tensor], Tensor] = lambda number: number,
) -> list[Tensor]:
    """bool [r] of each microbatch: of the tokens that count those with the highest entropy, as many as the share says, rounded
    up, and those that are equal to the last of them.

    Args:
        entropies: [r] of each microbatch.
        counts: bool [r] of each.
        share: above 0, up to 1.
        add: an int64 number [] over all data-parallel ranks.
    """
    # Floats that are not negative are in the order of their bits.
    bits = [entropy.float().clamp(min=0).view(torch.int32) for entropy in entropies]

    def number_from(threshold: Tensor) -> Tensor:
        return add(sum(((b >= threshold) & c).sum() for b, c in zip(bits, counts, strict=True)))

    threshold = torch.zeros((), dtype=torch.int32, device=bits[0].device)
    wanted = torch.div(number_from(threshold) * round(share * PARTS) + PARTS - 1, PARTS, rounding_mode="floor")
    for bit in reversed(range(31)):  # the largest threshold that leaves so many
        higher = threshold | (1 << bit)
        threshold = torch.where(number_from(higher) >= wanted, higher, threshold)
    return [(b >= threshold) & c for b, c in zip(bits, counts, strict=True)]
