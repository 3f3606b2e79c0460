"""The loss of GRPO: numbers worked out by hand, and the sums that must not depend on how a batch is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.losses import OBJECTIVES, GrpoTerms, grpo_loss, token_weights
from megatron_ext.losses.clipped import Grpo, Gspo
from megatron_ext.losses.logprobs import vocab_parallel_logprobs
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
    terms = GrpoTerms(Grpo(ratio_clip_max=0.3))
    loss, metrics, grad = loss_and_grad(log(1, 1.5, 1.5, 0.5, 0.5), tensor(0, 0, 0, 0, 0), advantages, weights, terms)
    assert close(loss, (weights * expected).sum())
    assert close(loss, -0.2 - 0.26 + 0.45 - 0.2 + 0.4)
    assert close(grad, weights * slope)
    assert close(metrics["clip_fraction"], 0.2 + 0.5)
    assert close(metrics["ratio"], 0.1 + 0.3 + 0.45 + 0.2 + 0.25)
    assert close(metrics["loss"], loss)
    assert not any(m.requires_grad for m in metrics.values())


def test_importance_multiplies_every_tokens_term(rng):
    """With its KL penalty and its entropy; measured is what was before."""
    old, reference, entropy = (-torch.rand(5, generator=rng, dtype=torch.float64) for _ in range(3))
    logprobs, importance = old + 0.1, torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    advantages, weights = tensor(1, -1, 2, -2, 1), tensor(0.1, 0.2, 0.3, 0.2, 0.2)
    terms = GrpoTerms(kl_penalty=0.3, entropy_bonus=0.2)
    fields = {"ref_logprobs": reference, "entropy": entropy}
    plain, metrics, gradient = loss_and_grad(logprobs, old, advantages, weights, terms, **fields)
    loss, others, found = loss_and_grad(logprobs, old, advantages, weights, terms, **fields, importance=importance)
    by_hand, _, slope = loss_and_grad(logprobs, old, advantages, weights * importance, terms, **fields)
    assert close(loss, by_hand) and close(found, slope) and close(found, gradient * importance)
    assert all(close(others[name], metrics[name]) for name in metrics if name != "loss") and not close(loss, plain)


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
        ("k2", (math.log(2) ** 2 / 2, math.log(4) ** 2 / 2), (math.log(2), -math.log(4))),
        # q/p - 1 + log(p/q)
        ("k3", (0.5 - 1 + math.log(2), 4 - 1 - math.log(4)), (1 - 0.5, 1 - 4)),
    ],
)
def test_kl_in_the_loss_by_hand(kind, values, slopes):
    """Beta times the weighted sum; the metric is k3 in any case."""
    logprobs, reference = log(0.5, 0.1), log(0.25, 0.4)
    weights, beta = tensor(0.25, 0.5), 0.1
    terms = GrpoTerms(kl_penalty=beta, kl_type=kind)
    loss, metrics, grad = loss_and_grad(logprobs, logprobs, tensor(0, 0), weights, terms, ref_logprobs=reference)
    assert close(metrics["kl"], (weights * tensor(0.5 - 1 + math.log(2), 4 - 1 - math.log(4))).sum())
    assert close(loss, beta * (weights * tensor(*values)).sum())
    assert close(grad, beta * weights * tensor(*slopes))


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
    terms = GrpoTerms(Gspo(ratio_clip_min=0.5, ratio_clip_max=0.5))
    logprobs = log(1.44, 1.0, 0.81, 99.0, 1.0, 2.0)
    loss, metrics, grad = loss_and_grad(logprobs, old, advantages, weights, terms, response_ids=ids, num_responses=5)
    # Means: sqrt(1.44 * 1) = 1.2, sqrt(0.81 * 1) = 0.9, and 2, which is clipped to 1.5.
    assert close(loss, -0.3 * 1.2 + 0.7 * 0.9 - 0.5 * 1.5)
    assert close(metrics["ratio"], 0.3 * 1.2 + 0.7 * 0.9 + 0.5 * 2)
    # d/d logprob: the token's own weight and advantage, times its response's ratio.
    assert close(grad, tensor(-0.1 * 1.2, -0.2 * 1.2, 0.3 * 0.9, 0, 0.4 * 0.9, 0))


@pytest.mark.parametrize("level", ["token", "sequence", "constant"])
def test_sequence_level_ratios_are_gspo_where_a_response_has_one_advantage(level, rng):
    """Value and gradient of the objective written with one ratio for each response, derived through its mean."""
    lengths = torch.tensor([3, 1, 6, 4])
    ids = torch.arange(4).repeat_interleave(lengths)
    r = len(ids)
    mask = torch.rand(r, generator=rng) < 0.7
    weights = token_weights(ids, mask, 4, int(mask.sum()), 4, level, 12.0).double()
    old, advantages = randn(rng, r), randn(rng, 4)
    logprobs = old + 0.2 * randn(rng, r)
    terms = GrpoTerms(Grpo(sequence_level_ratios=True))
    loss, _, grad = loss_and_grad(logprobs, old, advantages[ids], weights, terms, response_ids=ids, num_responses=4)
    leaf = logprobs.clone().requires_grad_()
    expected = tensor(0).squeeze()
    for i in range(4):
        rows = (ids == i) & mask
        if bool(rows.any()):
            ratio = (leaf - old)[rows].mean().exp()
            best = torch.minimum(ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i])
            expected = expected - weights[rows].sum() * best
    assert close(loss, expected.detach())
    assert close(grad, torch.autograd.grad(expected, leaf)[0] if bool(mask.any()) else torch.zeros(r))


def step_on(logits: Tensor, rate: float, rewards: Tensor | None = None, **fields) -> Tensor:
    """Plain descent by one step on the loss, summed over ALL tokens [v] with their probabilities."""
    logits = logits.clone().requires_grad_()
    eye, tokens = torch.eye(len(logits), dtype=torch.float64), torch.arange(len(logits))
    logprobs, entropy = vocab_parallel_logprobs(logits.expand(len(logits), -1), eye, tokens)
    old = logprobs.detach()
    gain = torch.zeros_like(old) if rewards is None else rewards - old.exp() @ rewards
    loss, _ = grpo_loss(logprobs, old, gain, old.exp(), GrpoTerms(**fields), entropy=entropy)
    return (logits - rate * torch.autograd.grad(loss, logits)[0]).detach()


def test_the_advantage_raises_the_mean_reward_at_every_step(rng):
    logits, rewards = randn(rng, 6), torch.randperm(6, generator=rng).double()
    means = []
    for _ in range(100):
        means.append(float(logits.softmax(0) @ rewards))
        logits = step_on(logits, 0.1, rewards)  # short of 2 / smoothness: every step must gain
    assert all(b > a for a, b in zip(means, means[1:], strict=False))


@pytest.mark.parametrize("bonus", [0.5, -0.5])
def test_the_entropy_bonus_moves_the_entropy_its_way(bonus, rng):
    """Up to log v for a positive one, through the log-probabilities of the vocabulary; down to 0 for a negative one."""
    logits = randn(rng, 6)
    for _ in range(150):
        logits = step_on(logits, 4.0, entropy_bonus=bonus)
    logp = logits.log_softmax(0)
    assert abs(-(logp.exp() @ logp) - (math.log(6) if bonus > 0 else 0)) < (1e-6 if bonus > 0 else 0.1)


def test_clipping_takes_the_gradient_of_what_went_far_enough(rng):
    """And of nothing else: where the ratio left its range the way the advantage wants it."""
    r, low, high = 300, 0.1, 0.4
    old, advantages, weights = randn(rng, r), randn(rng, r), randn(rng, r).abs()
    logprobs = old + randn(rng, r)
    ratio = (logprobs - old).exp()
    enough = torch.where(advantages > 0, ratio > 1 + high, ratio < 1 - low)
    _, metrics, grad = loss_and_grad(
        logprobs, old, advantages, weights, GrpoTerms(Grpo(ratio_clip_min=low, ratio_clip_max=high))
    )
    assert torch.allclose(grad, torch.where(enough, 0, -weights * advantages * ratio), rtol=1e-12)
    assert torch.allclose(metrics["clip_fraction"], weights[enough].sum(), rtol=1e-12)


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


def test_constant_weights_by_hand():
    """Whatever was sampled, and whatever of it counts."""
    weights = token_weights(IDS, MASK, 4, global_tokens=8, global_responses=2, level="constant", constant=16.0)
    assert weights.tolist() == [0.0625, 0.0625, 0, 0.0625, 0.0625, 0]


def test_a_batch_in_which_nothing_counts_has_no_weight():
    for level in ("token", "sequence", "constant"):
        assert token_weights(IDS, torch.zeros(6, dtype=torch.bool), 4, 0, 0, level, 8.0).tolist() == [0.0] * 6


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("level", ["token", "sequence", "constant"])
def test_losses_and_metrics_of_microbatches_add_up(level, name, rng):
    """However responses are dealt to microbatches: loss, metrics and gradients are those of the whole batch."""
    lengths = [5, 1, 7, 3, 4]
    ids = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    r = len(ids)
    old, ref, advantages = randn(rng, r) * 0.3 - 3, randn(rng, r) * 0.3 - 3, randn(rng, 5)[ids]
    logprobs, entropy = old + 0.3 * randn(rng, r), randn(rng, r).abs()
    mask = torch.rand(r, generator=rng) < 0.8
    mask[5] = False  # a response without a token that counts
    responses = len(ids[mask].unique())
    terms = GrpoTerms(OBJECTIVES[name](), kl_penalty=0.1, entropy_bonus=0.05)

    def part(first: int, last: int):
        rows = (ids >= first) & (ids < last)
        local = ids[rows] - first
        weights = token_weights(local, mask[rows], last - first, int(mask.sum()), responses, level, 60.0)
        parts = (x[rows] for x in (logprobs, old, advantages))
        return loss_and_grad(*parts, weights.double(), terms, ref[rows], entropy[rows], local, last - first)

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
        ({"entropy_bonus": math.nan}, "entropy_bonus=nan must be finite"),
    ],
)
def test_refuses_impossible_terms(fields, words):
    with pytest.raises(ValueError, match=words):
        GrpoTerms(**fields)


def test_refuses_terms_without_what_they_are_made_of_and_an_unknown_level():
    with pytest.raises(ValueError, match="initial_policy_kl_penalty=0.1 needs the reference"):
        grpo_loss(log(1), log(1), tensor(1), tensor(1), GrpoTerms(kl_penalty=0.1))
    with pytest.raises(ValueError, match="entropy_bonus=0.1 needs the entropies"):
        grpo_loss(log(1), log(1), tensor(1), tensor(1), GrpoTerms(entropy_bonus=0.1))
    with pytest.raises(ValueError, match="need response_ids and num_responses"):
        grpo_loss(log(1), log(1), tensor(1), tensor(1), GrpoTerms(Gspo()), response_ids=IDS[:1])
    with pytest.raises(ValueError, match="normalisation must be one of token, sequence, constant, got 'batch'"):
        token_weights(IDS, MASK, 4, 1, 1, "batch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [-300.0, 300.0])
def test_extreme_ratios_leave_the_gradient_finite_and_of_the_right_sign(gap, dtype):
    """e^300 overflows fp32. Clipped terms have gradient 0 and not 0 * inf; where the minimum takes the ratio itself, a bad
    token that became far likelier, it is still pulled down."""
    old, logprobs = torch.full((2,), -gap, dtype=dtype), torch.zeros(2, dtype=dtype)
    args = torch.tensor([1.0, -1.0], dtype=dtype), torch.full((2,), 0.5, dtype=dtype)
    loss, _, grad = loss_and_grad(logprobs, old, *args, GrpoTerms())
    assert math.isfinite(float(loss)) and bool(grad.isfinite().all())
    if gap > 0:
        assert grad[0] == 0 and grad[1] > 1e9
    for weighted in (False, True):
        terms = GrpoTerms(kl_penalty=0.1, kl_weighted=weighted)
        loss, metrics, grad = loss_and_grad(logprobs, old, *args, terms, old)
        assert math.isfinite(float(loss)) and bool(grad.isfinite().all()) and math.isfinite(float(metrics["kl"]))
