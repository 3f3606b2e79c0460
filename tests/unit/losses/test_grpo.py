"""The GRPO objective: numbers worked out by hand, and the sums that must not depend on how a batch is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.losses.grpo import (
    GrpoTerms,
    group_advantages,
    groups_with_signal,
    grpo_loss,
    kl_estimate,
    token_weights,
)
from tests.layouts import randn

ULPS = 1e-12  # fp64 values of order 1


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log(*ratios: float) -> Tensor:
    return tensor(*(math.log(r) for r in ratios))


def close(a: Tensor | float, b: Tensor | float) -> bool:
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return bool((a - b).abs().max() <= ULPS)


def loss_and_grad(logprobs: Tensor, *args, **kwargs) -> tuple[Tensor, dict, Tensor]:
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = grpo_loss(leaf, *args, **kwargs)
    return loss.detach(), metrics, torch.autograd.grad(loss, leaf)[0]


def test_clipping_by_hand():
    """Ratios 1, 1.5, 1.5, 0.5, 0.5 with advantages of both signs, clip range [0.8, 1.3].

    The minimum takes the clipped value where the ratio moved the way the advantage wants, and has no gradient there.
    """
    advantages = tensor(2, 1, -1, 1, -1)
    weights = tensor(0.1, 0.2, 0.3, 0.4, 0.5)
    expected = tensor(-2, -1.3, 1.5, -0.5, 0.8)
    slope = tensor(-2, 0, 1.5, -0.5, 0)  # -A rho where unclipped
    terms = GrpoTerms(ratio_clip_min=0.2, ratio_clip_max=0.3)
    loss, metrics, grad = loss_and_grad(log(1, 1.5, 1.5, 0.5, 0.5), tensor(0, 0, 0, 0, 0), advantages, weights, terms)
    assert close(loss, (weights * expected).sum())
    assert close(loss, -0.2 - 0.26 + 0.45 - 0.2 + 0.4)
    assert close(grad, weights * slope)
    assert close(metrics["clip_fraction"], 0.2 + 0.5)
    assert close(metrics["ratio"], 0.1 + 0.3 + 0.45 + 0.2 + 0.25)
    assert close(metrics["loss"], loss)
    assert not any(m.requires_grad for m in metrics.values())


def test_only_the_difference_from_the_old_policy_counts(rng):
    logprobs, shift, advantages, weights = randn(rng, 6), randn(rng, 6), randn(rng, 6), randn(rng, 6).abs()
    a, _, grad_a = loss_and_grad(logprobs, logprobs.clone(), advantages, weights, GrpoTerms())
    b, _, grad_b = loss_and_grad(logprobs + shift, logprobs + shift, advantages, weights, GrpoTerms())
    assert close(a, -(weights * advantages).sum()) and close(a, b)
    assert close(grad_a, -weights * advantages) and close(grad_a, grad_b)


@pytest.mark.parametrize(
    ("kind", "values", "slopes"),
    [
        # log(p/q) = ln 2, -ln 4
        ("k1", (math.log(2), -math.log(4)), (1, 1)),
        ("k2", (math.log(2) ** 2 / 2, math.log(4) ** 2 / 2), (math.log(2), -math.log(4))),
        # q/p - 1 + log(p/q)
        ("k3", (0.5 - 1 + math.log(2), 4 - 1 - math.log(4)), (1 - 0.5, 1 - 4)),
    ],
)
def test_kl_estimators_by_hand(kind, values, slopes):
    """Values and derivatives, and their place in the loss: beta times the weighted sum."""
    logprobs, reference = log(0.5, 0.1), log(0.25, 0.4)
    assert close(kl_estimate(logprobs, reference, kind), tensor(*values))
    weights, beta = tensor(0.25, 0.5), 0.1
    terms = GrpoTerms(kl_penalty=beta, kl_type=kind)
    loss, metrics, grad = loss_and_grad(logprobs, logprobs, tensor(0, 0), weights, terms, ref_logprobs=reference)
    assert close(metrics["kl"], (weights * tensor(*values)).sum())
    assert close(loss, beta * metrics["kl"])
    assert close(grad, beta * weights * tensor(*slopes))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_of_equal_policies_is_zero_and_never_negative(kind, rng):
    logprobs = randn(rng, 100)
    assert torch.count_nonzero(kl_estimate(logprobs, logprobs, kind)) == 0
    assert bool((kl_estimate(logprobs, logprobs + randn(rng, 100), kind) >= 0).all())


def test_k1_and_k3_are_unbiased():
    """Over the policy's own distribution both have KL(p || q) as their mean, exactly."""
    p, q = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        assert close((p * kl_estimate(p.log(), q.log(), kind)).sum(), exact)


def test_reference_without_penalty_is_only_measured():
    args = log(0.5), log(0.5), tensor(1.0), tensor(1.0), GrpoTerms()
    plain, _, grad = loss_and_grad(*args)
    measured, metrics, grad_measured = loss_and_grad(*args, ref_logprobs=log(0.25))
    assert close(plain, measured) and close(grad, grad_measured)
    assert close(metrics["kl"], 0.5 - 1 + math.log(2))


def test_entropy_bonus_by_hand():
    entropy = tensor(0.5, 2.0).requires_grad_()
    weights = tensor(0.25, 0.5)
    loss, metrics = grpo_loss(
        log(1, 1), log(1, 1), tensor(1, -1), weights, GrpoTerms(entropy_bonus=0.1), entropy=entropy
    )
    assert close(metrics["entropy"], 0.125 + 1.0)
    assert close(loss.detach(), -0.25 + 0.5 - 0.1 * 1.125)
    assert close(torch.autograd.grad(loss, entropy)[0], -0.1 * weights)


def test_sequence_level_ratios_by_hand():
    """GSPO: a response's tokens share the geometric mean of its ratios; tokens of weight 0 have no part in it."""
    old = tensor(0, 0, 0, 0, 0, 0)
    ids = torch.tensor([0, 0, 2, 2, 2, 3])
    weights = tensor(0.1, 0.2, 0.3, 0.0, 0.4, 0.5)
    advantages = tensor(1, 1, -1, -1, -1, 1)
    terms = GrpoTerms(ratio_clip_min=0.5, ratio_clip_max=0.5, sequence_level_ratios=True)
    logprobs = log(1.44, 1.0, 0.81, 99.0, 1.0, 2.0)
    loss, metrics, grad = loss_and_grad(logprobs, old, advantages, weights, terms, response_ids=ids)
    # Means: sqrt(1.44 * 1) = 1.2, sqrt(0.81 * 1) = 0.9, and 2, which is clipped to 1.5.
    assert close(loss, -0.3 * 1.2 + 0.7 * 0.9 - 0.5 * 1.5)
    assert close(metrics["ratio"], 0.3 * 1.2 + 0.7 * 0.9 + 0.5 * 2)
    # d/d logprob: the response's whole weight, times its ratio, spread over its counted tokens.
    assert close(grad, tensor(-0.3 * 1.2 / 2, -0.3 * 1.2 / 2, 0.7 * 0.9 / 2, 0, 0.7 * 0.9 / 2, 0))


@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_by_hand(normalize):
    rewards = tensor(1, 0, 0, 1, 5, 5, 5, 5).view(2, 4)
    found = group_advantages(rewards, normalize=normalize)
    std = math.sqrt(4 * 0.25 / 3)  # of (1, 0, 0, 1), unbiased
    row = tensor(0.5, -0.5, -0.5, 0.5) / (std + 1e-6 if normalize else 1)
    assert close(found[0], row)
    assert torch.count_nonzero(found[1]) == 0  # all alike: nothing to learn, and no division by zero


def test_leave_one_out_by_hand():
    """The baseline is the mean of the others: 3 - (1 + 2) / 2 and so on."""
    rewards = tensor(1, 2, 3).view(1, 3)
    assert close(group_advantages(rewards, False, leave_one_out=True), tensor(-1.5, 0, 1.5).view(1, 3))
    assert close(group_advantages(rewards, True, leave_one_out=True), tensor(-1.5, 0, 1.5).view(1, 3) / (1 + 1e-6))


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 100.1])
def test_equal_rewards_that_do_not_average_exactly_teach_nothing(value, leave_one_out):
    """The mean of eleven times 0.1 is not 0.1 in floating point: that rounding must not be normalised to order 1."""
    for samples in range(2, 30):
        rewards = torch.full((1, samples), value)
        assert torch.count_nonzero(group_advantages(rewards, True, leave_one_out)) == 0


def test_single_sample_groups():
    rewards = tensor(3, 4).view(2, 1)
    assert torch.count_nonzero(group_advantages(rewards)) == 0
    with pytest.raises(ValueError, match="use_leave_one_out_baseline needs samples_per_prompt of at least 2"):
        group_advantages(rewards, leave_one_out=True)


IDS = torch.tensor([0, 0, 0, 2, 2, 3])
MASK = torch.tensor([True, True, False, True, True, False])


def test_token_level_weights_by_hand():
    weights = token_weights(IDS, MASK, 4, global_tokens=8, global_responses=5, level="token")
    assert weights.dtype == torch.float32
    assert weights.tolist() == [0.125, 0.125, 0, 0.125, 0.125, 0]


def test_sequence_level_weights_by_hand():
    """1 / (counted tokens of the response x counted responses of the batch)."""
    weights = token_weights(IDS, MASK, 4, global_tokens=8, global_responses=2, level="sequence")
    assert weights.tolist() == [0.25, 0.25, 0, 0.25, 0.25, 0]
    weights = token_weights(torch.tensor([0, 1, 1, 1, 1]), torch.ones(5, dtype=torch.bool), 2, 5, 2, "sequence")
    assert weights.tolist() == [0.5, 0.125, 0.125, 0.125, 0.125]


def test_a_batch_in_which_nothing_counts_has_no_weight():
    for level in ("token", "sequence"):
        assert token_weights(IDS, torch.zeros(6, dtype=torch.bool), 4, 0, 0, level).tolist() == [0.0] * 6


@pytest.mark.parametrize("sequence_ratios", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_losses_and_metrics_of_microbatches_add_up(level, sequence_ratios, rng):
    """However responses are dealt to microbatches: loss, metrics and gradients are those of the whole batch."""
    lengths = [5, 1, 7, 3, 4]
    ids = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    r = len(ids)
    old, ref, advantages = randn(rng, r) * 0.3 - 3, randn(rng, r) * 0.3 - 3, randn(rng, 5)[ids]
    logprobs, entropy = old + 0.3 * randn(rng, r), randn(rng, r).abs()
    mask = torch.rand(r, generator=rng) < 0.8
    mask[5] = False  # a response without a token that counts
    responses = len(ids[mask].unique())
    terms = GrpoTerms(kl_penalty=0.1, entropy_bonus=0.05, sequence_level_ratios=sequence_ratios)

    def part(first: int, last: int):
        rows = (ids >= first) & (ids < last)
        local = ids[rows] - first
        weights = token_weights(local, mask[rows], last - first, int(mask.sum()), responses, level)
        return loss_and_grad(
            logprobs[rows], old[rows], advantages[rows], weights.double(), terms, ref[rows], entropy[rows], local
        )

    whole_loss, whole_metrics, whole_grad = part(0, 5)
    for cuts in ([0, 2, 5], [0, 1, 3, 5], [0, 1, 2, 3, 4, 5]):
        parts = [part(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
        # fp32 weights: the sums agree to fp32 rounding of at most 1 / tokens, hence 1e-6.
        assert abs(sum(p[0] for p in parts) - whole_loss) <= 1e-6
        for name, value in whole_metrics.items():
            assert abs(sum(p[1][name] for p in parts) - value) <= 1e-6
        assert (torch.cat([p[2] for p in parts]) - whole_grad).abs().max() <= 1e-6
    assert torch.count_nonzero(whole_grad[~mask]) == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kl_type": "k4"}, "must be one of k1, k2, k3, got 'k4'"),
        ({"ratio_clip_min": 1.0}, r"ratio_clip_min=1.0 must lie in \[0, 1\)"),
        ({"ratio_clip_max": -0.1}, "ratio_clip_max=-0.1"),
    ],
)
def test_refuses_impossible_terms(fields, words):
    with pytest.raises(ValueError, match=words):
        GrpoTerms(**fields)


def test_refuses_a_penalty_without_a_reference_and_an_unknown_level():
    with pytest.raises(ValueError, match="initial_policy_kl_penalty=0.1 needs the reference"):
        grpo_loss(log(1), log(1), tensor(1), tensor(1), GrpoTerms(kl_penalty=0.1))
    with pytest.raises(ValueError, match="must be 'token' or 'sequence', got 'batch'"):
        token_weights(IDS, MASK, 4, 1, 1, "batch")


def test_equal_rewards_carry_no_signal_whatever_their_rounding():
    """0.1 some times over need not average to 0.1 in fp32; its standard deviation is then not 0."""
    groups = [torch.full((1, n), value) for n in range(2, 33) for value in (0.1, 1 / 3, 0.7, 0.9)]
    assert any(bool(g.std(1) > 0) for g in groups)
    for group in groups:
        assert groups_with_signal(group).tolist() == [False]
        assert torch.count_nonzero(group_advantages(group)) == 0
    assert groups_with_signal(torch.tensor([[0.1, 0.1, 0.2]])).tolist() == [True]


@pytest.mark.parametrize("gap", [-300.0, 300.0])
def test_extreme_ratios_leave_the_gradient_finite(gap):
    """e^300 overflows fp32; the clipped term has gradient 0 and not 0 * inf."""
    old = torch.full((2,), -gap)
    loss, _, grad = loss_and_grad(
        torch.zeros(2), old, torch.tensor([1.0, -1.0]), torch.full((2,), 0.5), GrpoTerms(kl_penalty=0.1), old
    )
    assert math.isfinite(float(loss)) and bool(grad.isfinite().all())
