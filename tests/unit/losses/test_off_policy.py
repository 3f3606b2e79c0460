"""Weights for tokens of another sampler: what they do to means, their bounds, and what does not count."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.losses.off_policy import (
    OffPolicyTerms,
    effective_share,
    mismatch,
    off_policy_weights,
    rejected_responses,
)
from tests.layouts import randn

WIDE = {"low": 0.0, "high": 1e9}


def drawn(rng):
    """(old, sampled, weights, response_ids, k): responses in an order that is not sorted, some tokens left out."""
    draw = random.Random()
    k = draw.randint(1, 6)
    lengths = [draw.randint(1, 9) for _ in range(k)]
    ids = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    ids = ids[torch.randperm(len(ids), generator=rng)]
    sampled = -randn(rng, len(ids)).abs()
    old = sampled + 0.7 * randn(rng, len(ids))
    weights = torch.rand(len(ids), generator=rng, dtype=torch.float64) + 0.1
    weights[torch.rand(len(ids), generator=rng) < 0.2] = 0
    weights[0] = 0.5  # one that counts
    return old, sampled, weights / weights.sum(), ids, k


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("form", ["truncate", "mask"])
def test_one_token_at_a_time(level, form, rng):
    old, sampled, weights, ids, k = drawn(rng)
    terms = OffPolicyTerms(level, form, low=0.8, high=1.3)
    found, metrics = off_policy_weights(old, sampled, weights, ids, k, terms)
    bounded = 0.0
    rejected = rejected_responses(old, sampled, weights > 0, ids, k, 1.2)
    for i, response in enumerate(ids.tolist()):
        mine = [j for j, other in enumerate(ids.tolist()) if other == response and weights[j] > 0]
        d = [float(old[j] - sampled[j]) for j in mine]
        own = float(old[i] - sampled[i]) if weights[i] > 0 else 0.0
        x = {"token": own, "sequence": sum(d), "geometric": sum(d) / max(len(d), 1)}[level]
        ratio = torch.tensor(x, dtype=torch.float64).exp().item()
        outside = ratio > 1.3 or (form == "mask" and ratio < 0.8)
        expected = (0.0 if form == "mask" else 1.3) if outside else ratio
        bounded += float(weights[i]) * outside
        assert float(found[i]) == pytest.approx(expected, rel=1e-12)
        assert bool(rejected[response]) == any(abs(value) > 1.2 for value in d)
    assert float(metrics["importance_bounded"]) == pytest.approx(bounded, abs=1e-12)


def test_means_under_the_sampler_become_means_under_the_trainer(rng):
    """Over all responses of two tokens of a small vocabulary, weighed by the sampler: unbiased by sequence."""
    v = 5
    first, second = randn(rng, 2, v).log_softmax(-1), randn(rng, 2, v, v).log_softmax(-1)  # of both policies
    value = randn(rng, v, v)
    pairs = [(a, b) for a in range(v) for b in range(v)]
    old, sampled = (torch.tensor([p for a, b in pairs for p in (first[m, a], second[m, a, b])]) for m in (0, 1))
    ids = torch.arange(len(pairs)).repeat_interleave(2)
    terms = OffPolicyTerms("sequence", **WIDE)
    found, metrics = off_policy_weights(old, sampled, torch.ones(len(ids)) / len(ids), ids, len(pairs), terms)
    by_sampler = torch.stack([sampled[2 * i] + sampled[2 * i + 1] for i in range(len(pairs))]).exp()
    by_trainer = torch.stack([old[2 * i] + old[2 * i + 1] for i in range(len(pairs))]).exp()
    weighed = (by_sampler * found[::2] * value.flatten()).sum()
    assert float(weighed) == pytest.approx(float((by_trainer * value.flatten()).sum()), rel=1e-10)


def test_the_divergence_is_that_of_the_sampler(rng):
    """Its mean over the sampler's tokens is KL(sampler, old), and that of the weights is 1."""
    old, sampled = randn(rng, 7).log_softmax(-1), randn(rng, 7).log_softmax(-1)
    seen = mismatch(old, sampled, sampled.exp())
    assert float(seen["sampler_kl"]) == pytest.approx(float((sampled.exp() * (sampled - old)).sum()), rel=1e-10)
    _, metrics = off_policy_weights(old, sampled, sampled.exp(), torch.zeros(7, dtype=torch.int64), 1, OffPolicyTerms())
    assert float(metrics["importance"]) == pytest.approx(1.0, rel=1e-12)


def test_samplers_that_agree_change_nothing(rng):
    old, _, weights, ids, k = drawn(rng)
    for level in ("token", "sequence", "geometric"):
        terms = OffPolicyTerms(level, "mask", low=1.0, high=1.0)
        found, metrics = off_policy_weights(old, old.clone(), weights, ids, k, terms)
        assert torch.equal(found, torch.ones_like(found))
        assert metrics["importance_bounded"] == 0 and not any(mismatch(old, old.clone(), weights).values())
        assert effective_share(float(metrics["importance"]), float(metrics["importance_squared"])) == pytest.approx(1.0)


def test_what_does_not_count_is_not_looked_at(rng):
    """Not even where it is no number: an observed token has no log-probability of a sampler."""
    old, sampled, weights, ids, k = drawn(rng)
    terms = OffPolicyTerms("geometric")
    found, metrics = off_policy_weights(old, sampled, weights, ids, k, terms)
    seen, rejected = mismatch(old, sampled, weights), rejected_responses(old, sampled, weights > 0, ids, k, 1.0)
    sampled = torch.where(weights > 0, sampled, -torch.inf)
    again, others = off_policy_weights(old, sampled, weights, ids, k, terms)
    torch.testing.assert_close(again, found, rtol=0, atol=0)
    assert metrics == others and seen == mismatch(old, sampled, weights)
    assert torch.equal(rejected, rejected_responses(old, sampled, weights > 0, ids, k, 1.0))


def test_what_the_sampler_did_not_tell_is_taken_for_the_trainers(rng):
    old, sampled, weights, ids, k = drawn(rng)
    unknown = torch.rand(len(ids), generator=rng) < 0.5
    told, untold = torch.where(unknown, old, sampled), torch.where(unknown, torch.nan, sampled)
    for level in ("token", "sequence", "geometric"):
        terms = OffPolicyTerms(level, "mask", low=0.7, high=1.5)
        (found, metrics), (expected, others) = (
            off_policy_weights(old, x, weights, ids, k, terms) for x in (untold, told)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert metrics == others and mismatch(old, untold, weights) == mismatch(old, told, weights)


def test_microbatches_add_up(rng):
    old, sampled, weights, ids, k = drawn(rng)
    terms = OffPolicyTerms("sequence", "mask")
    found, metrics = off_policy_weights(old, sampled, weights, ids, k, terms)
    metrics |= mismatch(old, sampled, weights)
    parts = []
    for response in range(k):
        mine = ids == response
        zeros = torch.zeros(int(mine.sum()), dtype=torch.int64)
        kept, more = off_policy_weights(old[mine], sampled[mine], weights[mine], zeros, 1, terms)
        torch.testing.assert_close(kept, found[mine], rtol=1e-12, atol=1e-12)
        parts.append(more | mismatch(old[mine], sampled[mine], weights[mine]))
    for name, value in metrics.items():
        values = [float(part[name]) for part in parts]
        total = max(values) if name.endswith("_max") else sum(values)
        assert total == pytest.approx(float(value), rel=1e-12, abs=1e-12)


def test_the_effective_share_is_kishs():
    assert effective_share(1.0, 1.0) == 1.0
    ratios = torch.tensor([3.0, 1.0, 0.0, 0.0])
    weights = torch.full((4,), 0.25)
    share = effective_share(float((weights * ratios).sum()), float((weights * ratios**2).sum()))
    assert share == pytest.approx(16 / 10 / 4)  # (3 + 1)^2 / (3^2 + 1^2) of four


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"level": "word"}, "level must be one of token, sequence, geometric, got 'word'"),
        ({"form": "drop"}, "form must be one of truncate, mask, got 'drop'"),
        ({"high": 0.9}, "high=0.9 must be finite and at least 1"),
        ({"low": 1.5}, r"low=1.5 must lie in \[0, 1\]"),
    ],
)
def test_bad_terms_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        OffPolicyTerms(**fields)
