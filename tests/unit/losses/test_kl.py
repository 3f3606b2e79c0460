"""Every form of the KL penalty: closed forms per token, and where its mean over a small vocabulary leads the policy."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.clipped import Gspo
from megatron_ext.losses.grpo import GrpoTerms, grpo_loss
from megatron_ext.losses.kl import k3, weighted_k3

FORMS = {
    "k1 in the reward": {"kl_type": "k1", "kl_in_reward": True},
    "k2": {"kl_type": "k2"},
    "k3": {"kl_type": "k3"},
    "weighted k3": {"kl_type": "k3", "kl_weighted": True},
}
every_form = pytest.mark.parametrize("form", FORMS)
VOCABULARY = 6
FARTHEST = {torch.float32: 22.180709777918249, torch.float64: 177.44567822334599}  # a quarter of the largest exponents


def penalty(form: str, logprobs: Tensor, old: Tensor, ref: Tensor, weights: Tensor, beta: float = 1.0) -> Tensor:
    """The loss in which nothing but the penalty is left."""
    terms = GrpoTerms(kl_penalty=beta, **FORMS[form])
    return grpo_loss(logprobs, old, torch.zeros_like(old), weights, terms, ref)[0]


def slopes(form: str, d: Tensor, log_ratio: Tensor | None = None, ref: Tensor | None = None) -> Tensor:
    """d penalty / d log policy of each token, [r]; the ratio is that of weighted k3, and 1 for the others."""
    ref = torch.zeros_like(d) if ref is None else ref
    logprobs = (ref + d).requires_grad_()
    old = logprobs.detach() - (log_ratio if form == "weighted k3" else 0)
    return torch.autograd.grad(penalty(form, logprobs, old, ref, torch.ones_like(d)), logprobs)[0]


def closed_form(form: str, d: float, log_ratio: float) -> float:
    """In 60 digits."""
    with localcontext(prec=60):
        exact = {
            "k3": lambda: 1 - (-Decimal(d)).exp(),
            "weighted k3": lambda: Decimal(log_ratio).exp() * Decimal(d),
        }
        return float(exact.get(form, lambda: Decimal(d))())


def distances(rng, count: int, largest: float) -> Tensor:
    """Of both signs and every size from 1e-12 up, fp64."""
    size = 10 ** (torch.rand(count, generator=rng, dtype=torch.float64) * (12 + math.log10(largest)) - 12)
    size[: count // 2] = torch.rand(count // 2, generator=rng, dtype=torch.float64) * largest
    return size * (torch.randint(2, (count,), generator=rng) * 2 - 1)


@every_form
def test_derivatives_are_the_closed_forms_up_to_a_hundred_nats(form, rng):
    d, log_ratio = distances(rng, 400, 100), distances(rng, 400, 100)
    old = d - log_ratio  # what the loss gets: both distances again, rounded
    found = slopes(form, d, log_ratio)
    expected = [closed_form(form, a, a - b) for a, b in zip(d.tolist(), old.tolist(), strict=True)]
    for value, exact in zip(found.tolist(), expected, strict=True):
        assert abs(value - exact) <= 1e-12 * abs(exact)


@every_form
def test_derivatives_are_finite_differences_of_the_value(form, rng):
    """Up to ten nats, by logprobs as they stand in the loss, the ratio's included."""
    count, step = 60, 1e-4
    ref = -torch.rand(count, generator=rng, dtype=torch.float64) * 3
    d, log_ratio = distances(rng, count, 10), distances(rng, count, 3)
    logprobs = ref + d
    old = logprobs - (log_ratio if form == "weighted k3" else 0)

    def values(moved: Tensor) -> Tensor:
        return torch.stack([penalty(form, *(x[i : i + 1] for x in (moved, old, ref, one))) for i in range(count)])

    one = torch.ones(count, dtype=torch.float64)
    differences = (values(logprobs + step) - values(logprobs - step)) / (2 * step)
    slope = slopes(form, d, log_ratio, ref)
    # Truncation is step^2 / 6 times the third derivative; rounding 1e-16 of the value over the step.
    assert bool(((differences - slope).abs() <= 1e-7 * (1 + slope.abs() + values(logprobs).abs())).all())


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_are_finite_and_of_the_right_sign_however_far(form, dtype, rng):
    d = torch.cat([distances(rng, 200, 100), distances(rng, 200, 2000)]).to(dtype)
    log_ratio = distances(rng, 400, 60).to(dtype)
    found = slopes(form, d, log_ratio)
    assert found.dtype == dtype and bool(found.isfinite().all())
    assert torch.equal(found.sign(), d.sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_stay_at_a_quarter_of_the_largest_exponent(dtype):
    """Where the module's docstring says; below it the closed form, beyond it the same number."""
    bound = FARTHEST[dtype]
    near, at, beyond = (torch.tensor([-bound * x], dtype=dtype) for x in (0.99, 1.0, 5.0))
    assert slopes("k3", near).item() == pytest.approx(-math.exp(0.99 * bound), rel=1e-4)
    assert slopes("k3", at).item() == slopes("k3", beyond).item() == pytest.approx(-math.exp(bound), rel=1e-4)
    one = torch.ones(1, dtype=dtype)
    assert slopes("weighted k3", one, -beyond).item() == pytest.approx(math.exp(bound), rel=1e-4)
    assert torch.finfo(dtype).max > math.exp(bound) ** 2 * 1e15  # leaves room for the square in a gradient's norm


def test_k3_is_never_negative_and_0_at_the_reference_alone(rng):
    d = distances(rng, 1000, 100)
    d = d[d.abs() > 1e-6]  # nearer than that d^2 / 2 is rounding of d
    assert bool((k3(d) > 0).all()) and k3(torch.zeros(1)).item() == 0
    assert bool((weighted_k3(d, distances(rng, len(d), 100)) > 0).all())


def draw(rng, spread: float) -> Tensor:
    """Logits [v]: with 0.7 no token has less than 4% of the mass."""
    return (2 * torch.rand(VOCABULARY, generator=rng, dtype=torch.float64) - 1) * spread


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of log-probabilities [v]."""
    return (p.exp() * (p - q)).sum()


def mean_gradient(form: str, logits: Tensor, ref: Tensor, old: Tensor | None = None) -> Tensor:
    """Of the penalty, by the logits, over ALL tokens with the probabilities of the policy that samples."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    old = logprobs.detach() if old is None else old
    return torch.autograd.grad(penalty(form, logprobs, old, ref, old.exp()), logits)[0]


@every_form
@pytest.mark.parametrize("spread", [1e-3, 1.0, 10.0, 50.0])
def test_the_mean_gradient_is_that_of_the_divergence(form, spread, rng):
    """KL(policy, reference), or KL(reference, policy) for k3, at distances up to a hundred nats."""
    for _ in range(10):
        ref = draw(rng, 0.7).log_softmax(0)
        logits = (ref + draw(rng, spread)).requires_grad_()
        policy = logits.log_softmax(0)
        exact = divergence(ref, policy) if form == "k3" else divergence(policy, ref)
        (expected,) = torch.autograd.grad(exact, logits)
        found = mean_gradient(form, logits.detach(), ref)
        # Rounding is that of the terms, whose sum over all tokens is 0.
        assert (found - expected).abs().max() <= 1e-12 * max(1.0, spread)


def test_weighted_k3_keeps_it_after_updates(rng):
    """Sampled by a policy that the trained one has left."""
    for _ in range(20):
        ref, old = (draw(rng, 2.0).log_softmax(0) for _ in range(2))
        logits = draw(rng, 2.0).requires_grad_()
        (expected,) = torch.autograd.grad(divergence(logits.log_softmax(0), ref), logits)
        assert (mean_gradient("weighted k3", logits.detach(), ref, old) - expected).abs().max() <= 1e-12


@every_form
def test_descent_on_the_penalty_alone_ends_at_the_reference(form, rng):
    """300 steps of plain gradient descent."""
    ref = draw(rng, 0.7).log_softmax(0)
    logits = ref + draw(rng, 1.5)
    for _ in range(300):
        logits = logits - 2 * mean_gradient(form, logits, ref)
    assert divergence(logits.log_softmax(0), ref) < 1e-6


@every_form
def test_descent_from_a_hundred_nats_away_ends_at_the_reference(form, rng):
    """By signs: plain descent stands still where a policy is certain, whatever it descends on."""
    ref = draw(rng, 0.7).log_softmax(0)
    logits = ref + draw(rng, 50)
    for step in range(350):
        logits = logits - 6 * 0.96**step * mean_gradient(form, logits, ref).sign()
    assert divergence(logits.log_softmax(0), ref) < 1e-6


@every_form
def test_the_metric_is_the_divergence_under_every_form(form, rng):
    """In the mean over what was sampled, before and after updates, and without a penalty."""
    for terms in (GrpoTerms(kl_penalty=0.3, **FORMS[form]), GrpoTerms()):
        ref, policy, old = (draw(rng, 2.0).log_softmax(0) for _ in range(3))
        for sampled in (policy, old):
            _, metrics = grpo_loss(policy, sampled, torch.zeros(VOCABULARY), sampled.exp(), terms, ref)
            assert abs(metrics["kl"] - divergence(policy, ref)) <= 1e-12


@every_form
def test_the_penalty_adds_to_the_advantage_whatever_that_is(form, rng):
    """Beta times the closed form, times the token's weight: in the reward it comes after the group's normalisation."""
    d, advantages, weights = (torch.randn(50, generator=rng, dtype=torch.float64) for _ in range(3))
    weights, beta = weights.abs(), 0.3
    logprobs = d.clone().requires_grad_()
    terms = GrpoTerms(kl_penalty=beta, **FORMS[form])
    loss = grpo_loss(logprobs, d, 1000 * advantages, weights, terms, torch.zeros_like(d))[0]
    (found,) = torch.autograd.grad(loss, logprobs)
    closed = torch.tensor([closed_form(form, x, 0.0) for x in d.tolist()], dtype=torch.float64)
    assert torch.allclose(found, weights * (beta * closed - 1000 * advantages), rtol=1e-12, atol=1e-12)


def test_in_the_reward_clipping_stops_the_penalty_with_the_advantage():
    """Ratios 1, 1.5, 1.5, 0.5, 0.5; d = 1 or -1 of the policy that sampled, beta = 0.5, so A is -0.5 or 0.5."""
    ratios = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    old, d = torch.zeros(5, dtype=torch.float64), torch.tensor([1.0, 1, -1, 1, -1], dtype=torch.float64)
    logprobs = ratios.log().requires_grad_()
    terms = GrpoTerms(kl_penalty=0.5, **FORMS["k1 in the reward"])
    loss, metrics = grpo_loss(logprobs, old, torch.zeros(5), torch.ones(5), terms, old - d)
    (found,) = torch.autograd.grad(loss, logprobs)
    # Unclipped where the ratio moved against what the advantage wants: -A rho.
    assert torch.allclose(found, torch.tensor([0.5, 0.75, 0, 0, -0.25], dtype=torch.float64), rtol=1e-12)
    assert metrics["clip_fraction"].item() == 2


def test_sequence_level_ratios_take_the_penalty_of_each_token(rng):
    """Its own d, times its weight and its response's ratio; in the loss the ratio is the token's own."""
    ids = torch.arange(4).repeat_interleave(torch.tensor([3, 1, 5, 2]))
    r, beta = len(ids), 0.2
    ref, old, weights = (torch.randn(r, generator=rng, dtype=torch.float64) for _ in range(3))
    weights = weights.abs()
    logprobs = (old + 0.01 * torch.randn(r, generator=rng, dtype=torch.float64)).requires_grad_()
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, ids, (logprobs - old).detach())
    ratio = (sums / torch.bincount(ids))[ids].exp()  # within the clip range
    own = (logprobs - old).detach().exp()
    expected = {"k1 in the reward": ratio * (old - ref), "weighted k3": own * (logprobs - ref).detach()}
    for form, closed in expected.items():
        terms = GrpoTerms(Gspo(ratio_clip_min=0.2, ratio_clip_max=0.2), kl_penalty=beta, **FORMS[form])
        loss = grpo_loss(logprobs, old, torch.zeros(r), weights, terms, ref, response_ids=ids, num_responses=4)[0]
        (found,) = torch.autograd.grad(loss, logprobs)
        assert torch.allclose(found, beta * weights * closed, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kl_type": "k4"}, "must be one of k1, k2, k3, got 'k4'"),
        ({"kl_type": "k1"}, "reference_policy_kl_type=k1 in the loss has no effect.* set use_kl_in_reward=true, or"),
        ({"kl_in_reward": True}, "use_kl_in_reward=true needs reference_policy_kl_type=k1, got k3"),
        ({"kl_in_reward": True, "kl_type": "k2"}, "use_kl_in_reward=true needs reference_policy_kl_type=k1, got k2"),
        (
            {"kl_weighted": True, "kl_type": "k2"},
            "use_bias_correction_kl=true weighs k3 .* reference_policy_kl_type=k2",
        ),
        ({"kl_weighted": True, "kl_type": "k1", "kl_in_reward": True}, "reference_policy_kl_type=k1: set k3"),
        ({"kl_weighted": True, "kl_penalty": 0.0}, "use_bias_correction_kl=true has no effect while .*penalty=0"),
        ({"kl_in_reward": True, "kl_type": "k1", "kl_penalty": 0.0}, "use_kl_in_reward=true has no effect while"),
        ({"kl_penalty": -0.1}, "initial_policy_kl_penalty=-0.1 must be finite and not negative"),
        ({"kl_penalty": math.nan}, "initial_policy_kl_penalty=nan"),
        ({"kl_penalty": math.inf}, "initial_policy_kl_penalty=inf"),
    ],
)
def test_refuses_forms_that_pull_nowhere(fields, words):
    with pytest.raises(UserError, match=words):
        GrpoTerms(**{"kl_penalty": 0.1} | fields)
