"""The tokens of highest entropy: which they are, however a batch is cut, and what the others still do."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_ext.losses import OBJECTIVES, GrpoTerms, grpo_loss
from megatron_ext.losses.high_entropy import high_entropy_tokens
from tests.layouts import randn


def drawn(rng) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies, some of them equal, some 0 or a rounding below it; and which tokens count."""
    n = random.Random().randint(1, 60)
    entropy = torch.cat((randn(rng, n).abs(), randn(rng, n).abs().round(decimals=1), torch.tensor([0.0, -1e-9])))
    return entropy.float(), torch.rand(len(entropy), generator=rng) < 0.8


@pytest.mark.parametrize("share", [1e-6, 0.2, 0.5, 0.999, 1.0])
def test_they_are_the_first_of_the_sorted_ones(share, rng):
    entropy, counts = drawn(rng)
    (found,) = high_entropy_tokens([entropy], [counts], share)
    wanted = math.ceil(round(share * 10**6) * int(counts.sum()) / 10**6)
    order = entropy[counts].clamp(min=0).sort(descending=True).values
    expected = counts & (entropy.clamp(min=0) >= order[wanted - 1]) if wanted else counts
    assert torch.equal(found, expected) and int(found.sum()) >= wanted


def test_they_do_not_depend_on_how_a_batch_is_cut(rng):
    """Into microbatches, of which some may have no token at all; or over ranks, which know each other's numbers alone."""
    entropy, counts = drawn(rng)
    (whole,) = high_entropy_tokens([entropy], [counts], 0.3)
    cuts = sorted([0, 0, len(entropy), *torch.randint(len(entropy), (3,), generator=rng).tolist()])
    parts = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    found = high_entropy_tokens([entropy[p] for p in parts], [counts[p] for p in parts], 0.3)
    assert torch.equal(torch.cat(found), whole)
    said: list[torch.Tensor] = []
    high_entropy_tokens([entropy[parts[-1]]], [counts[parts[-1]]], 0.3, lambda number: said.append(number) or number)
    assert len(said) == 32 and all(number.dim() == 0 and number.dtype == torch.int64 for number in said)


def test_where_nothing_counts_nothing_is_kept():
    assert not high_entropy_tokens([torch.ones(3)], [torch.zeros(3, dtype=torch.bool)], 0.5)[0].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_is_of_the_kept_tokens_and_the_rest_of_all(name, rng):
    r = 40
    old, reference, gains, weights = randn(rng, r), randn(rng, r), randn(rng, r), randn(rng, r).abs()
    kept, entropy = torch.rand(r, generator=rng) < 0.5, randn(rng, r).abs()
    ids = torch.arange(4).repeat_interleave(10)

    def gradient(objective_alone: bool, **given):
        leaf = (old + 0.1).requires_grad_()
        terms = GrpoTerms(OBJECTIVES[name](), **({} if objective_alone else {"kl_penalty": 0.3, "entropy_bonus": 0.1}))
        loss, metrics = grpo_loss(leaf, old, gains, weights, terms, reference, entropy, ids, 4, **given)
        return torch.autograd.grad(loss, leaf)[0], metrics

    plain, _ = gradient(True)
    masked, metrics = gradient(True, kept=kept)
    assert torch.equal(masked, torch.where(kept, plain, 0)) and metrics["high_entropy"] == (weights * kept).sum()
    penalty = gradient(False)[0] - plain
    torch.testing.assert_close(gradient(False, kept=kept)[0], masked + penalty, rtol=1e-12, atol=1e-12)
