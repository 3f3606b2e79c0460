"""Every objective of the registry: its formula once more, by cases; what it gives on its own samples; what it refuses."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.losses import OBJECTIVES, GrpoTerms, Objective, PolicyTokens, grpo_loss, token_weights
from megatron_ext.losses.cispo import Cispo
from megatron_ext.losses.clipped import Dapo, DrGrpo, DualClip, Grpo, Gspo
from megatron_ext.losses.gpg import Gpg
from megatron_ext.losses.sapo import Sapo
from tests.layouts import randn
from tests.plain_objectives import PlainResponse, plain_loss

# Beside the defaults, options that matter.
CASES: dict[str, list[dict]] = {
    "grpo": [
        {},
        {"ratio_clip_min": 0.1, "ratio_clip_max": 0.4, "normalisation": "sequence"},
        {"sequence_level_ratios": True},
    ],
    "dapo": [{}, {"ratio_max": 1.5}],
    "dr_grpo": [{}, {"ratio_clip_max": 0.3}],
    "dual_clip": [{}, {"ratio_max": 1.3, "normalisation": "constant"}],
    "gspo": [{}, {"ratio_clip_min": 0.1, "ratio_clip_max": 0.1}],
    "cispo": [{}, {"ratio_min": 0.9, "ratio_max": 1.1, "normalisation": "sequence"}],
    "sapo": [{}, {"temperature_positive": 3.0, "temperature_negative": 5.0, "normalisation": "token"}],
    "gpg": [{}, {"normalisation": "sequence"}],
}
EACH = [pytest.param(name, options, id=f"{name} {options}") for name, cases in CASES.items() for options in cases]


def drawn(rng, lengths=(5, 1, 7, 3, 4)) -> list[PlainResponse]:
    """Responses of which one has no token that counts; the policy has moved since it sampled."""
    batch = []
    for n in lengths:
        old = -randn(rng, n).abs()
        mask = torch.rand(n, generator=rng) < 0.8
        gain = float(randn(rng, 1))
        batch.append(
            PlainResponse(old + 0.5 * randn(rng, n), old, old + 0.3 * randn(rng, n), randn(rng, n).abs(), mask, gain)
        )
    batch[1].mask[:] = False
    batch[0].mask[0] = True
    for of in batch:
        of.logprobs.requires_grad_()
    return batch


def ours(objective: Objective, batch: list[PlainResponse], constant: float = 1.0, **terms):
    """(loss, metrics, gradient [r])."""
    logprobs, old, reference, entropy, mask = (
        torch.cat([getattr(of, name).detach() for of in batch])
        for name in ("logprobs", "old", "reference", "entropy", "mask")
    )
    ids = torch.arange(len(batch)).repeat_interleave(torch.tensor([len(of.old) for of in batch]))
    gains = torch.tensor([of.advantage for of in batch], dtype=old.dtype)[ids]
    counts = int(mask.sum()), sum(bool(of.mask.any()) for of in batch)
    weights = token_weights(ids, mask, len(batch), *counts, objective.normalisation, constant).double()
    leaf = logprobs.requires_grad_()
    given = (reference, entropy, ids, len(batch))
    loss, metrics = grpo_loss(leaf, old, gains, weights, GrpoTerms(objective, **terms), *given)
    return loss.detach(), metrics, torch.autograd.grad(loss, leaf)[0]


def test_every_objective_has_a_case():
    assert set(CASES) == set(OBJECTIVES)


@pytest.mark.parametrize(("name", "options"), EACH)
@pytest.mark.parametrize("kl", ["none", "k3", "reward"])
def test_loss_and_gradient_are_the_formulas(name, options, kl, rng):
    """1e-12, fp64: sums of a few dozen terms of order 1."""
    batch, objective = drawn(rng), OBJECTIVES[name](**options)
    beta = 0.0 if kl == "none" else 0.3
    terms = {
        "none": {},
        "k3": {"kl_penalty": beta},
        "reward": {"kl_penalty": beta, "kl_type": "k1", "kl_in_reward": True},
    }

    def plain():
        return plain_loss(name, asdict(objective), batch, beta, kl, 0.1, constant=50.0)

    def derived(expected):
        slopes = torch.autograd.grad(expected, [of.logprobs for of in batch], allow_unused=True)
        return torch.cat([torch.zeros_like(of.old) if g is None else g for g, of in zip(slopes, batch, strict=True)])

    # All ratios that were drawn may be clipped, or all but those of tokens that do not count.
    while not (expected := plain()).requires_grad or not (slope := derived(expected)).any():
        batch = drawn(rng)
    loss, metrics, found = ours(objective, batch, 50.0, entropy_bonus=0.1, **terms[kl])
    assert abs(loss - expected.detach()) <= 1e-12
    assert (found - slope).abs().max() <= 1e-12 and torch.count_nonzero(found)
    assert math.isfinite(float(metrics["ratio"]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_its_own_samples_every_objective_is_the_policy_gradient(name, rng):
    """The ratio is exactly 1, the divergence from itself exactly 0, nothing is clipped, and the gradient is that of -A log pi."""
    batch = drawn(rng)
    for of in batch:
        of.old = of.reference = of.logprobs.detach()
    objective = OBJECTIVES[name]()
    _, metrics, found = ours(objective, batch, 60.0, kl_penalty=0.5)
    ids = torch.arange(len(batch)).repeat_interleave(torch.tensor([len(of.old) for of in batch]))
    mask = torch.cat([of.mask for of in batch])
    counts = int(mask.sum()), sum(bool(of.mask.any()) for of in batch)
    weights = token_weights(ids, mask, len(batch), *counts, objective.normalisation, 60.0).double()
    gains = torch.tensor([of.advantage for of in batch], dtype=torch.float64)[ids]
    assert metrics["ratio"] == weights.sum() and metrics["kl"] == 0 and metrics.get("clip_fraction", 0) == 0
    torch.testing.assert_close(found, -weights * gains, rtol=1e-14, atol=0)


def of_ratios(objective: Objective, ratios: list[float], gains: list[float], dtype=torch.float64):
    """(losses, derivatives by log pi) of tokens."""
    leaf = torch.tensor(ratios, dtype=torch.float64).log().to(dtype).requires_grad_()
    zeros, ones = torch.zeros_like(leaf.detach()), torch.ones_like(leaf.detach())
    tokens = PolicyTokens(leaf, zeros, torch.tensor(gains, dtype=dtype), ones)
    losses, metrics = objective.policy_loss(tokens)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0], metrics


def test_dual_clip_by_hand():
    """A bad token that has become five times likelier pulls three times as hard, and is told of no more; a good one is clipped
    at 1.2 as ever, one that is bad and hardly likelier counts as it is."""
    losses, slopes, metrics = of_ratios(DualClip(), [5, 2, 0.5, 5, 1], [-1, -1, -1, 1, 1])
    assert torch.allclose(losses, torch.tensor([3.0, 2, 0.8, -1.2, -1], dtype=torch.float64))
    assert torch.allclose(slopes, torch.tensor([0.0, 2, 0, 0, -1], dtype=torch.float64))
    assert metrics["clip_fraction"] == 3


def test_cispo_by_hand():
    """No token is without a gradient: its weight alone is bounded."""
    losses, slopes, metrics = of_ratios(Cispo(ratio_max=2.0, ratio_min=0.5), [4, 0.1, 1.5], [1, -1, 2])
    expected = torch.tensor([-2.0, 0.5, -3], dtype=torch.float64)
    assert torch.allclose(slopes, expected)
    assert torch.allclose(losses, expected * torch.tensor([4, 0.1, 1.5], dtype=torch.float64).log())
    assert metrics["clip_fraction"] == 2


def test_sapo_by_hand():
    """2 / tau at the ratio 1, with the derivative of the plain ratio; a quarter of tau decides how soon it is let go."""
    losses, slopes, _ = of_ratios(Sapo(temperature_negative=2.0), [1, 1], [1, -1])
    assert torch.allclose(losses, torch.tensor([-2.0, 1], dtype=torch.float64))
    assert torch.allclose(slopes, torch.tensor([-1.0, 1], dtype=torch.float64))
    _, far, _ = of_ratios(Sapo(), [4, 4], [1, -1])
    assert 0 < far[1] < -far[0] < 4  # bad ones sooner, and both below the plain ratio's


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("gap", [-300.0, 300.0])
def test_extreme_ratios_leave_every_objective_finite(name, gap):
    """fp32, where e^300 is infinite; and no gradient turns round."""
    logprobs = torch.zeros(2).requires_grad_()
    gains, weights = torch.tensor([1.0, -1.0]), torch.full((2,), 0.5)
    given = GrpoTerms(OBJECTIVES[name]()), None, None, torch.tensor([0, 1]), 2
    loss, metrics = grpo_loss(logprobs, torch.full((2,), -gap), gains, weights, *given)
    (found,) = torch.autograd.grad(loss, logprobs)
    assert math.isfinite(float(loss.detach())) and bool(found.isfinite().all()) and found[0] <= 0 <= found[1]
    assert all(math.isfinite(float(m)) for m in metrics.values())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grpo(ratio_clip_min=1.0), r"ratio_clip_min=1.0 must lie in \[0, 1\)"),
        (
            lambda: Grpo(ratio_clip_min=0.8, ratio_clip_max=1.28),
            "look like the bounds of the ratio: they are its distances from 1, so give 0.2 and 0.28",
        ),
        (lambda: Grpo(ratio_clip_max=-0.1), "ratio_clip_max=-0.1 must not be negative"),
        (lambda: Grpo(ratio_clip_max=math.nan), "ratio_clip_max=nan must not be negative"),
        (lambda: Grpo(ratio_max=1.2), r"ratio_max=1.2 must be finite and above 1 \+ ratio_clip_max = 1.2"),
        (lambda: Grpo(ratio_max=math.inf), "ratio_max=inf must be finite"),
        (lambda: Grpo(normalisation="batch"), "must be one of token, sequence, constant, got 'batch'"),
        (
            lambda: Dapo(normalisation="sequence"),
            "normalisation=sequence contradicts this objective, which has normalisation=token",
        ),
        (
            lambda: Dapo(sequence_level_ratios=True),
            "sequence_level_ratios=true contradicts this objective, which has .*=false",
        ),
        (
            lambda: DrGrpo(normalisation="token"),
            "normalisation=token contradicts this objective, which has normalisation=constant",
        ),
        (
            lambda: DrGrpo(advantages="group"),
            "advantages=group contradicts this objective, which has advantages=group_mean",
        ),
        (lambda: Gspo(sequence_level_ratios=False), "sequence_level_ratios=false contradicts this objective"),
        (lambda: DualClip(ratio_max=None), "ratio_max=null contradicts dual_clip"),
        (lambda: Cispo(ratio_max=0.9), "ratio_max=0.9 be finite and at least 1"),
        (lambda: Cispo(ratio_min=-1.0), r"ratio_min=-1.0 must lie in \[0, 1\]"),
        (lambda: Sapo(temperature_positive=0.0), "temperature_positive=0.0 must be positive and finite"),
        (lambda: Gpg(normalisation=""), "must be one of token"),
    ],
)
def test_impossible_options_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_ratios_of_responses_need_to_know_the_responses():
    with pytest.raises(UserError, match="ratios of whole responses need response_ids and num_responses"):
        of_ratios(Gspo(), [1.0], [1.0])


@dataclass(frozen=True, kw_only=True)
class Bounded(Objective):
    """One of one's own."""

    bound: float = 2.0

    def policy_loss(self, tokens):
        ratio = tokens.log_ratio.exp().clamp(max=self.bound)
        return -ratio * tokens.advantages, {"ratio": (tokens.weights * ratio).sum()}


def test_one_of_ones_own_is_an_objective_like_any_other(rng):
    batch = drawn(rng)
    loss, metrics, found = ours(Bounded(bound=1.1), batch, kl_penalty=0.1)
    assert set(metrics) == {"loss", "ratio", "kl", "entropy"} and torch.count_nonzero(found)
    two_sided = DualClip(ratio_clip_max=0.1, ratio_clip_min=1 - 1e-9, ratio_max=1.1 + 1e-9)  # no ratio is below 1e-9
    dual, _, _ = ours(two_sided, batch, kl_penalty=0.1)
    assert abs(loss - dual) <= 1e-8
