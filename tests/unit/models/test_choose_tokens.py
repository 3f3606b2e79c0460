"""Choosing tokens: greedy, filters, the inverse of the cumulative distribution, and the random numbers behind it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.models.generation import SamplingParams, UniformDraws, choose_tokens

GRID = 4000


def frequencies(logits: Tensor, **options) -> Tensor:
    """Share of each token over an even grid of uniforms: within 1 / GRID of its probability, without any chance."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens = choose_tokens(logits.expand(GRID, -1), SamplingParams(max_new_tokens=1, **options), uniform)
    assert tokens.dtype == torch.int64 and tokens.shape == (GRID,)
    return torch.bincount(tokens, minlength=logits.numel()).double() / GRID


def assert_is(found: Tensor, probability: Tensor) -> None:
    assert (found - probability).abs().max() <= 1 / GRID


def test_greedy_takes_the_most_likely(rng):
    logits = torch.randn(9, 31, generator=rng)
    params = SamplingParams(max_new_tokens=1, use_greedy=True, top_k=3, top_p=0.1)
    assert torch.equal(choose_tokens(logits, params, torch.zeros(9)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampling_follows_the_distribution(temperature, rng):
    logits = 2 * torch.randn(23, generator=rng)
    assert_is(frequencies(logits, temperature=temperature), (logits.double() / temperature).softmax(0))


@pytest.mark.parametrize("k", [1, 4, 22, 23, 1000])
def test_top_k_keeps_the_k_most_likely_and_their_proportions(k, rng):
    logits = 2 * torch.randn(23, generator=rng)
    kept = logits.double().masked_fill(logits.argsort(descending=True).argsort() >= k, -math.inf)
    assert_is(frequencies(logits, top_k=k), kept.softmax(0))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [2]), (0.49, [2]), (0.51, [2, 0]), (0.79, [2, 0]), (0.81, [2, 0, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p, kept):
    probability = torch.tensor([0.3, 0.05, 0.5, 0.15], dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = probability[kept] / probability[kept].sum()
    assert_is(frequencies(probability.log().float(), top_p=top_p), expected)


def test_filters_apply_in_order():
    """Temperature, then top_k, then top_p on what is left: 0.4/0.3/0.2/0.1 at T=0.5 and k=3 is 16/9/4 of 29."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    found = frequencies(logits, temperature=0.5, top_k=3, top_p=0.6)
    assert_is(found, torch.tensor([16 / 25, 9 / 25, 0, 0], dtype=torch.float64))
    # top_p first, at T=1 without top_k, would have kept a third token.
    assert torch.count_nonzero(frequencies(logits, top_p=0.75)) == 3


def test_rows_are_sampled_by_their_own_number(rng):
    logits = torch.randn(50, 11, generator=rng)
    uniform = torch.rand(50, generator=rng, dtype=torch.float64)
    params = SamplingParams(max_new_tokens=1, top_k=7, top_p=0.9)
    together = choose_tokens(logits, params, uniform)
    alone = [choose_tokens(logits[i : i + 1], params, uniform[i : i + 1]) for i in range(50)]
    assert torch.equal(together, torch.cat(alone))


def test_the_ends_of_the_interval_choose_possible_tokens():
    """0 and the largest number below 1 must not fall on tokens of probability 0 at the ends."""
    logits = torch.tensor([-math.inf, 0.3, 1.0, -0.2, -math.inf]).expand(2, -1)
    uniform = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert choose_tokens(logits, SamplingParams(max_new_tokens=1), uniform).tolist() == [1, 3]


def test_draws_repeat_with_the_seed_and_differ_without():
    a, b, c = UniformDraws(5), UniformDraws(5), UniformDraws(6)
    first = [a.next(7) for _ in range(3)]
    assert all(torch.equal(x, b.next(7)) for x in first)
    assert not torch.equal(first[0], c.next(7)) and not torch.equal(first[0], first[1])
    for x in first:
        assert x.dtype == torch.float64 and bool(((x >= 0) & (x < 1)).all())


def test_draws_do_not_depend_on_how_responses_are_spread_over_ranks():
    """Every rank draws for all and keeps its slice: the slices of any spreading make up the whole, step by step."""
    whole = UniformDraws(9, total=12)
    for cuts in ([0, 4, 8, 12], [0, 6, 12], [0, 1, 12]):
        whole = UniformDraws(9)
        ranks = [UniformDraws(9, first=a, total=12) for a in cuts[:-1]]
        for _ in range(3):
            parts = [r.next(b - a) for r, a, b in zip(ranks, cuts, cuts[1:], strict=False)]
            assert torch.equal(torch.cat(parts), whole.next(12))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0; use use_greedy"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
    ],
)
def test_refuses_impossible_parameters(fields, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**({"max_new_tokens": 1} | fields))
