"""What GRPO's loss is of a microbatch."""

from __future__ import annotations

from torch import Tensor

from megatron_ext.losses.grpo import GrpoTerms, grpo_loss
from megatron_ext.losses.off_policy import OffPolicyTerms, mismatch, off_policy_weights
from recipes.grpo.batches import GRPOMicrobatch

__all__ = ["objective"]


def objective(
    microbatch: GRPOMicrobatch,
    logprobs: Tensor,
    entropy: Tensor,
    terms: GrpoTerms,
    off_policy: OffPolicyTerms | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss function of the engine's.

    Where nobody has asked for old log-probabilities the policy that sampled is the one that is trained, and `logprobs` are its:
    bit for bit what a pass before the update gives, because it is the same computation.

    Args:
        logprobs, entropy: [r], of the policy being trained.
        off_policy: weights that make up for the sampler; None: none.

    Returns:
        (scalar loss, metrics), which add up over microbatches and ranks.
    """
    m, groups = microbatch, microbatch.batch.groups
    old = logprobs.detach() if m.old_logprobs is None else m.old_logprobs
    importance, seen = None, {}
    if m.sampled_logprobs is not None:
        seen |= mismatch(old, m.sampled_logprobs, m.weights)
    if off_policy is not None:
        of_sampler = old, m.sampled_logprobs, m.weights, groups.response_ids, groups.num_responses
        importance, more = off_policy_weights(*of_sampler, off_policy)
        seen |= more
    loss, metrics = grpo_loss(
        logprobs,
        old,
        m.advantages,
        m.weights,
        terms,
        ref_logprobs=m.ref_logprobs,
        entropy=entropy,
        response_ids=groups.response_ids,
        num_responses=groups.num_responses,
        importance=importance,
    )
    return loss, metrics | seen
