"""Choosing tokens: greedy, filters, the inverse of the cumulative distribution, and the random numbers behind it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_ext.rollouts import SamplingParams
from megatron_ext.rollouts.choosing import choose_tokens
from megatron_ext.rollouts.draws import ResponseDraws

GRID = 4000


def frequencies(logits: Tensor, **options) -> Tensor:
    """Share of each token over an even grid of uniforms: within 1 / GRID of its probability, without any chance."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens, _ = choose_tokens(logits.expand(GRID, -1), SamplingParams(max_new_tokens=1, **options), uniform)
    assert tokens.dtype == torch.int64 and tokens.shape == (GRID,)
    return torch.bincount(tokens, minlength=logits.numel()).double() / GRID


def assert_is(found: Tensor, probability: Tensor) -> None:
    assert (found - probability).abs().max() <= 1 / GRID


def test_greedy_takes_the_most_likely(rng):
    logits = torch.randn(9, 31, generator=rng)
    params = SamplingParams(max_new_tokens=1, use_greedy=True, top_k=3, top_p=0.1)
    assert torch.equal(choose_tokens(logits, params, torch.zeros(9))[0], logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampling_follows_the_distribution(temperature, rng):
    logits = 2 * torch.randn(23, generator=rng)
    assert_is(frequencies(logits, temperature=temperature), (logits.double() / temperature).softmax(0))


def test_the_log_probability_is_that_of_the_share(rng):
    """Also of the first and the last token, and of the last that has a share where a number is rounded up to 1."""
    logits = torch.cat((2 * torch.randn(9, 31, generator=rng), torch.full((9, 4), -math.inf)), 1)
    for number in (0.0, 0.5, 1.0):
        tokens, said = choose_tokens(logits, SamplingParams(1), torch.full((9,), number, dtype=torch.float64))
        assert (tokens < 31).all() and (number > 0 or not tokens.any())
        expected = logits.double().log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        assert said.dtype == torch.float32 and (said - expected).abs().max() <= 1e-5


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
    together, logprobs = choose_tokens(logits, params, uniform)
    alone = [choose_tokens(logits[i : i + 1], params, uniform[i : i + 1]) for i in range(50)]
    assert torch.equal(together, torch.cat([tokens for tokens, _ in alone]))
    assert torch.equal(logprobs, torch.cat([found for _, found in alone]))


def test_the_ends_of_the_interval_choose_possible_tokens():
    """0 and the largest number below 1 must not fall on tokens of probability 0 at the ends."""
    logits = torch.tensor([-math.inf, 0.3, 1.0, -0.2, -math.inf]).expand(2, -1)
    uniform = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert choose_tokens(logits, SamplingParams(max_new_tokens=1), uniform)[0].tolist() == [1, 3]


def transformers_choice(logits: Tensor, seen: Tensor, params: SamplingParams) -> Tensor:
    """The probabilities that transformers' own processors leave, in its order."""
    from transformers.generation import logits_process as hf

    steps = [
        hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        hf.TemperatureLogitsWarper(params.temperature),
    ]
    steps += [hf.TopKLogitsWarper(params.top_k)] if params.top_k else []
    steps += [hf.TopPLogitsWarper(params.top_p), hf.MinPLogitsWarper(params.min_p)]
    scores = logits.double()
    for step in steps:
        scores = step(seen, scores)
    return scores.softmax(-1)


def cumulative(logits: Tensor, seen: Tensor, params: SamplingParams) -> Tensor:
    """Of the likeliest tokens on, before top_p."""
    before = replace(params, top_p=1.0, min_p=0.0)
    return transformers_choice(logits, seen, before).sort(-1, descending=True).values.cumsum(-1)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7, "top_k": 9},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 14, "top_p": 0.85, "min_p": 0.1, "repetition_penalty": 1.2},
        {"temperature": 0.4, "top_p": 0.6, "min_p": 0.02},
    ],
)
def test_filters_are_those_of_transformers(options, rng):
    params = SamplingParams(1, **options)
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    for _ in range(5):
        clear = False
        while not clear:  # in fp32 and in fp64 another token may be the last within top_p
            logits, seen = 2 * torch.randn(1, 29, generator=rng), torch.randint(29, (1, 12), generator=rng)
            clear = params.top_p == 1 or (cumulative(logits, seen, params) - params.top_p).abs().min() > 1e-5
        tokens, logprobs = choose_tokens(logits.expand(GRID, -1), params, uniform, seen.expand(GRID, -1))
        assert_is(torch.bincount(tokens, minlength=29).double() / GRID, transformers_choice(logits, seen, params)[0])
        trained = (logits[0].double() / params.temperature).log_softmax(0)
        assert (logprobs - trained[tokens]).abs().max() <= 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0.5}, {"use_greedy": True}]
)
def test_a_row_that_is_not_finite_has_a_token_that_says_so(options, bad, rng):
    """One of the vocabulary, of log-probability NaN; the others stay as they are."""
    logits, uniform = torch.randn(3, 8, generator=rng), torch.rand(3, generator=rng).double()
    expected = choose_tokens(logits, SamplingParams(1, **options), uniform)
    logits[1, 5] = bad
    tokens, logprobs = choose_tokens(logits, SamplingParams(1, **options), uniform)
    assert 0 <= tokens[1] < 8 and logprobs[1].isnan()
    for row in (0, 2):
        assert (tokens[row], logprobs[row]) == (expected[0][row], expected[1][row])


def test_draws_count_and_do_not_depend_on_what_was_asked_before(rng):
    keys = [(5, 0, 1), (5, 1, 0), (5, 0, 0), (6, 0, 1), (2**40, 3, 1)]
    numbers = [[ResponseDraws(key)[i] for i in range(200)] for key in keys]
    assert len({x for row in numbers for x in row}) == 5 * 200 and all(0 <= x < 1 for row in numbers for x in row)
    draws = ResponseDraws(keys[0])
    order = torch.randperm(200, generator=rng).tolist()
    assert [draws[i] for i in order] == [numbers[0][i] for i in order]
    flat = torch.tensor(numbers).flatten()
    assert abs(flat.mean() - 0.5) < 0.06 and abs(flat.var() - 1 / 12) < 0.03  # six standard deviations


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0; use use_greedy"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"min_p": 1.0}, r"min_p must lie in \[0, 1\), got 1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0"),
        ({"stop_token_ids": (3, -1)}, r"stop_token_ids are ids of tokens, 0 or more, got \[-1\]"),
        ({"stop_strings": ("a", "")}, "stop_strings must not be empty"),
    ],
)
def test_refuses_impossible_parameters(fields, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**({"max_new_tokens": 1} | fields))
