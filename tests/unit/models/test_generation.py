"""Cached generation equals running the whole document again for every token, by a GPT in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.attention.cache import SharedPrefixCache
from megatron_ext.grouping import PrefixGroups
from megatron_ext.models import PrefixGroupedGPT, build_gpt
from megatron_ext.models.generation import SamplingParams, UniformDraws, choose_tokens, generate
from megatron_ext.models.prompt_streams import next_token_probabilities
from tests.gpt_cases import randomize, small_config
from tests.plain_gpt import greedy, plain_logits

GREEDY = SamplingParams(max_new_tokens=9, use_greedy=True)


def build(rng, world, **changes) -> PrefixGroupedGPT:
    model = build_gpt(small_config(**changes), world)
    randomize(model, rng)
    return model.double()


def weights_of(model: PrefixGroupedGPT) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def draw_prompts(rng, *lengths: int) -> list[list[int]]:
    return [torch.randint(61, (n,), generator=rng).tolist() for n in lengths]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_embeddings_and_output_weights": False, "qk_layernorm": False},
        {"window_size": [5, 0]},
        {"window_size": [14, 0], "window_attn_skip_freq": [0, 1], "attn_logit_softcapping": 2.0},
    ],
)
def test_greedy_equals_the_full_forward_token_by_token(changes, rng, world):
    """Prompts of unequal length in one batch, several samples of each (all alike when greedy)."""
    model = build(rng, world, **changes)
    prompts = draw_prompts(rng, 13, 1, 30, 16)
    found = generate(model, prompts, 3, GREEDY, UniformDraws(0))
    expected = [greedy(weights_of(model), model.model_config, p, 9, None) for p in prompts]
    assert found == [[response] * 3 for response in expected]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 12}, {"temperature": 1.6, "top_p": 0.8}, {"top_k": 9, "top_p": 0.9}]
)
def test_sampling_equals_the_full_forward_under_the_same_draws(options, rng, world):
    """Every response continues its own tokens: siblings share the prompt's cache and nothing else."""
    model = build(rng, world)
    prompts, samples = draw_prompts(rng, 11, 4), 4
    params = SamplingParams(max_new_tokens=7, **options)
    found = generate(model, prompts, samples, params, UniformDraws(3))
    draws, weights = UniformDraws(3), weights_of(model)
    expected: list[list[int]] = [[] for _ in range(2 * samples)]
    for _ in range(7):
        uniform = draws.next(2 * samples)
        for i, response in enumerate(expected):
            logits = plain_logits(weights, model.model_config, prompts[i // samples] + response)[-1:].float()
            response.append(int(choose_tokens(logits, params, uniform[i : i + 1])))
    assert [r for rs in found for r in rs] == expected
    assert len({tuple(r) for r in expected}) > 2  # the samples do differ


def test_responses_end_with_the_stop_token(rng, world):
    """Each is cut at its own first stop token, whatever the others do; the rest is as without one."""
    model = build(rng, world)
    prompts = draw_prompts(rng, 5, 9, 2, 21)
    free = [rs[0] for rs in generate(model, prompts, 1, GREEDY, UniformDraws(0))]
    stop = free[1][3]
    params = SamplingParams(max_new_tokens=9, use_greedy=True, stop_token_id=stop)
    found = [rs[0] for rs in generate(model, prompts, 1, params, UniformDraws(0))]
    assert found == [r[: r.index(stop) + 1] if stop in r else r for r in free]
    assert len(found[1]) <= 4 and found[1][-1] == stop


def test_generation_stops_when_every_response_has_ended(rng, world):
    """One draw per token actually sampled: the generator is not advanced beyond the last one."""
    model = build(rng, world)
    prompts = draw_prompts(rng, 6)
    free = generate(model, prompts, 1, GREEDY, UniformDraws(0))[0][0]
    stop = free[2]
    draws, untouched = UniformDraws(4), UniformDraws(4)
    params = SamplingParams(max_new_tokens=9, use_greedy=True, stop_token_id=stop)
    found = generate(model, prompts, 1, params, draws)[0][0]
    assert found == free[: free.index(stop) + 1]
    for _ in found:
        untouched.next(1)
    assert torch.equal(draws.next(1), untouched.next(1))


def test_the_same_seed_samples_the_same_however_prompts_are_spread(rng, world):
    """Data-parallel ranks with slices of the prompts and of the draws sample what one rank samples."""
    model = build(rng, world)
    prompts, samples = draw_prompts(rng, 7, 12, 3, 8), 3
    params = SamplingParams(max_new_tokens=6)
    whole = generate(model, prompts, samples, params, UniformDraws(8, total=12))
    halves = [
        generate(model, prompts[a:b], samples, params, UniformDraws(8, first=a * samples, total=12))
        for a, b in ((0, 2), (2, 4))
    ]
    assert whole == halves[0] + halves[1]


def test_generation_leaves_the_model_as_it_was(rng, world):
    """No gradient, no mode change, and training recomputation does not disturb it."""
    model = build(rng, world, activations_checkpoint_granularity="full")
    prompts = draw_prompts(rng, 10, 3)
    before = {name: p.clone() for name, p in model.state_dict().items() if p is not None}
    found = generate(model, prompts, 1, GREEDY, UniformDraws(0))
    assert [rs[0] for rs in found] == [greedy(weights_of(model), model.model_config, p, 9, None) for p in prompts]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items() if p is not None)


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_short_responses(new_tokens, rng, world):
    model = build(rng, world)
    prompts = draw_prompts(rng, 4)
    params = SamplingParams(max_new_tokens=new_tokens, use_greedy=True)
    found = generate(model, prompts, 2, params, UniformDraws(0))
    assert found == [[greedy(weights_of(model), model.model_config, prompts[0], new_tokens, None)] * 2]


@pytest.mark.parametrize("stream_tokens", [1, 20, 8192])
def test_next_token_probabilities_equal_the_full_forward(stream_tokens, rng, world):
    """However prompts are packed; logits are fp32."""
    model = build(rng, world)
    prompts, tokens = draw_prompts(rng, 13, 1, 5, 30), [7, 0, 60]
    found = next_token_probabilities(model, prompts, tokens, stream_tokens)
    weights = weights_of(model)
    expected = torch.stack([plain_logits(weights, model.model_config, p)[-1].softmax(-1)[tokens] for p in prompts])
    assert found.shape == (4, 3) and (found - expected).abs().max() <= 1e-6
    assert next_token_probabilities(model, [], tokens).shape == (0, 3)
    with pytest.raises(ValueError, match="prompt 0 has 200 tokens; that exceeds model.encoder_seq_length=128"):
        next_token_probabilities(model, [[1] * 200], tokens)


def test_refuses_prompts_that_cannot_be_continued(rng, world):
    model = build(rng, world, encoder_seq_length=16)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], 1, GREEDY, UniformDraws(0))
    with pytest.raises(ValueError, match="prompt 0 has 8 tokens; with max_new_tokens=9.*encoder_seq_length=16"):
        generate(model, [[1] * 8], 1, GREEDY, UniformDraws(0))
    assert len(generate(model, [[1] * 7], 1, GREEDY, UniformDraws(0))[0][0]) == 9


@pytest.mark.parametrize("lengths", [[(3, []), (0, [])], [(3, [2])]])
def test_the_cache_refuses_streams_that_are_not_prompts(lengths):
    with pytest.raises(ValueError, match="non-empty prefixes only"):
        SharedPrefixCache(PrefixGroups.from_lengths(lengths), 2, 4)
