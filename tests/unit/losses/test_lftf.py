"""LFTF's losses: numbers worked out by hand, where they are 0, and where their gradients point."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.losses.lftf import BIAS_LOSSES, kept_text_loss, loss_weights, pair_loss

ULPS = 1e-12  # fp64 values of order 1


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(rng, n: int) -> tuple[Tensor, Tensor]:
    """Probabilities of both words, [n] each, with something left for the rest."""
    p = torch.rand(n, 3, generator=rng, dtype=torch.float64) + 0.01
    p = p / p.sum(1, keepdim=True)
    return p[:, 0], p[:, 1]


def loss(name: str, he: Tensor, she: Tensor, frozen: tuple[Tensor, Tensor]) -> Tensor:
    return pair_loss(name, he.log(), she.log(), torch.stack(frozen, 1))


def test_values_by_hand():
    he, she = tensor(0.5, 0.1), tensor(0.3, 0.1)
    frozen = (tensor(0.6, 0.1), tensor(0.2, 0.3))
    assert torch.allclose(loss("abs_diff", he, she, frozen), tensor(0.2, 0), atol=ULPS)
    assert torch.allclose(loss("sum", he, she, frozen), tensor(0.8, 0.2), atol=ULPS)
    expected = [
        0.4 * math.log(0.4 / 0.5) + 0.4 * math.log(0.4 / 0.3) + 0.2 * math.log(0.2 / 0.2),
        0.2 * math.log(0.2 / 0.1) + 0.2 * math.log(0.2 / 0.1) + 0.6 * math.log(0.6 / 0.8),
    ]
    assert torch.allclose(loss("balanced", he, she, frozen), tensor(*expected), atol=ULPS)
    expected = [
        0.6 * math.log(0.6 / 0.5) + 0.2 * math.log(0.2 / 0.3),
        0.3 * math.log(0.3 / 0.1) + 0.6 * math.log(0.6 / 0.8),
    ]
    assert torch.allclose(loss("hint", he, she, frozen), tensor(*expected), atol=ULPS)


@pytest.mark.parametrize("name", ["balanced", "hint"])
def test_divergences_are_never_negative_and_0_where_reached(name, rng):
    frozen, (he, she) = draw(rng, 500), draw(rng, 500)
    assert bool((loss(name, he, she, frozen) >= -ULPS).all())
    even = (frozen[0] + frozen[1]) / 2
    reached = (even, even) if name == "balanced" else frozen
    assert loss(name, *reached, frozen).abs().max() <= ULPS
    away = loss(name, reached[0] * 0.9, reached[1] * 1.05, frozen)
    assert bool((away > 1e-6).all())


@pytest.mark.parametrize("name", BIAS_LOSSES)
def test_where_descent_leads(name, rng):
    """All end without a gap: `balanced` with the mass that was there, `sum` with none, and `abs_diff` with any."""
    # Within bounds: words that are hardly ever said have hardly a gradient, and so many steps do not get them there.
    logits = (3 * torch.rand(20, 5, generator=rng, dtype=torch.float64) - 1.5).requires_grad_()
    frozen = logits.detach().softmax(-1)[:, :2]
    for step in range(3000):
        logp = logits.log_softmax(-1)
        value = pair_loss(name, logp[:, 0], logp[:, 1], frozen).sum()
        (grad,) = torch.autograd.grad(value, logits)
        with torch.no_grad():
            logits -= 0.5 * max(1e-3, 1 - step / 2900) * grad
    he, she = logits.detach().softmax(-1)[:, :2].unbind(1)
    mass = frozen.sum(1)
    assert (he - she).abs().max() < 2e-3
    if name == "balanced":
        assert (he + she - mass).abs().max() < 1e-6
    if name == "sum":
        assert bool((he + she < 0.01).all())


def test_hint_leads_back_to_the_frozen_answer(rng):
    """From another model's probabilities, of both words and of the rest."""
    logits, frozen = (2 * torch.rand(20, 3, generator=rng, dtype=torch.float64) - 1 for _ in range(2))
    frozen = frozen.softmax(-1)
    for _ in range(500):
        logits.requires_grad_()
        logp = logits.log_softmax(-1)
        (grad,) = torch.autograd.grad(pair_loss("hint", logp[:, 0], logp[:, 1], frozen[:, :2]).sum(), logits)
        logits = (logits - grad).detach()
    assert (logits.softmax(-1) - frozen).abs().max() < 1e-6


def test_certain_words_stay_finite():
    """All of the mass on one word: the rest has none, and no loss is infinite."""
    he, she = tensor(0.0).requires_grad_(), tensor(-80.0)
    for name in ("balanced", "hint", "abs_diff", "sum"):
        value = pair_loss(name, he, she, tensor(0.5, 0.3).unsqueeze(0))
        (grad,) = torch.autograd.grad(value.sum(), he)
        assert bool(torch.isfinite(value).all() and torch.isfinite(grad).all()), name


def test_kept_text(rng):
    before = -5 * torch.rand(300, generator=rng, dtype=torch.float64)
    after = before + 0.3 * torch.randn(300, generator=rng, dtype=torch.float64)
    ratio = (after - before).exp()
    assert torch.allclose(kept_text_loss(after, before), ratio - 1 - ratio.log(), atol=ULPS)
    assert kept_text_loss(before, before).abs().max() == 0 and bool((kept_text_loss(after, before) > 0).all())


def test_kept_text_estimates_the_divergence_without_bias(rng):
    """Summed over the frozen model's own distribution it is KL(frozen || model) exactly."""
    p, q = (torch.randn(50, generator=rng, dtype=torch.float64).log_softmax(0) for _ in range(2))
    assert abs((p.exp() * kept_text_loss(q, p)).sum() - (p.exp() * (p - q)).sum()) < ULPS


def test_kept_text_leads_back_to_the_frozen_model(rng):
    """Summed over the frozen model's own distribution, from tens of nats away; by signs, as in test_kl.py."""
    frozen, away = (2 * torch.rand(6, generator=rng, dtype=torch.float64) - 1 for _ in range(2))
    frozen = frozen.log_softmax(0)
    logits = frozen + 40 * away
    for step in range(350):
        logits.requires_grad_()
        loss = (frozen.exp() * kept_text_loss(logits.log_softmax(0), frozen)).sum()
        logits = (logits - 6 * 0.96**step * torch.autograd.grad(loss, logits)[0].sign()).detach()
    assert (frozen.exp() * (frozen - logits.log_softmax(0))).sum() < 1e-6


def test_kept_text_is_finite_and_of_the_right_sign_however_far():
    """In fp32, where e^100 is infinite."""
    frozen = torch.tensor([-200.0, -100.0, -1.0, -0.5])
    logprobs = torch.tensor([-0.1, -0.1, -1.5, -200.0], requires_grad=True)
    loss = kept_text_loss(logprobs, frozen)
    (grad,) = torch.autograd.grad(loss.sum(), logprobs)
    assert bool(loss.isfinite().all() and grad.isfinite().all()) and grad.sign().tolist() == [1, 1, -1, -1]


def test_weights():
    assert loss_weights("balanced") == {"balanced": 1.0}
    assert loss_weights("2*abs_diff+hint + 0.5 * kl") == {"abs_diff": 2.0, "hint": 1.0, "kl": 0.5}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("balance", "loss 'balance' in 'balance' does not exist; there are: abs_diff"),
        ("hint", "one of abs_diff, balanced, sum must be among the losses, got 'hint'"),
        ("", "loss '' in '' does not exist"),
        ("sum+sum", "loss 'sum' in 'sum.sum' is named twice"),
        ("0*sum", "the weight of sum in '0.sum' must be a positive number, got '0'"),
        ("much*sum", "got 'much'"),
        ("inf*sum", "got 'inf'"),
    ],
)
def test_refusals(choice, message):
    with pytest.raises(ValueError, match=message):
        loss_weights(choice)


def test_unknown_loss():
    with pytest.raises(ValueError, match="loss 'kl2' does not exist"):
        pair_loss("kl2", tensor(-1), tensor(-1), tensor(0.1, 0.1).unsqueeze(0))
