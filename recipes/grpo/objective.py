"""What GRPO's loss is of a microbatch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.grpo import GrpoTerms, grpo_loss
from megatron_ext.losses.off_policy import OffPolicyTerms, effective_share, mismatch, off_policy_weights
from recipes.grpo.batches import GRPOMicrobatch
from recipes.run.metrics import METRICS

__all__ = ["as_means", "objective"]

KNOWN = frozenset(name.removeprefix("train_optim/") for name in METRICS)


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

    Raises:
        UserError: an objective of one's own gives metrics that are not in the table of metrics.

    Returns:
        (scalar loss, metrics), which add up over microbatches and ranks; "weight", of the tokens, is what makes means of them.
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
        kept=m.kept,
    )
    if unknown := metrics.keys() - KNOWN:
        raise UserError(
            f"trainer.grpo.objective: {type(terms.objective).__name__} gives metrics that nobody knows, "
            f"{', '.join(sorted(unknown))}: ratio and clip_fraction are logged, leave out others"
        )
    return loss, metrics | seen | {"weight": m.weights.sum()}


def as_means(sums: Mapping[str, float]) -> dict[str, float]:
    """An optimizer step's metrics as means over tokens, by weight, whatever it is that divides the loss.

    Args:
        sums: of `objective`, and of the engine's step.
    """
    weight = sums["weight"] or 1.0  # nothing counts
    means = {
        name: x
        if name in ("loss", "grad_norm", "lr", "skipped", "balance_loss") or name.endswith("_max")
        else x / weight
        for name, x in sums.items()
        if name != "weight"
    }
    if {"importance", "importance_squared"} <= means.keys():  # not of a step that was left out
        means["effective_samples"] = effective_share(means["importance"], means.pop("importance_squared"))
    return means
