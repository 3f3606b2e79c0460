"""Cached generation equals running the whole document again for every token, by a GPT in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.attention.pages import PAGE
from megatron_ext.errors import DivergedError
from megatron_ext.models import PrefixGroupedGPT, build_gpt
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.models.prompt_streams import next_token_probabilities
from megatron_ext.rollouts import MegatronSource, Request, SamplingParams
from megatron_ext.rollouts.choosing import choose_tokens
from megatron_ext.rollouts.draws import ResponseDraws
from megatron_ext.rotary import RopeScaling
from tests.gpt_cases import LATENT, randomize, small_config
from tests.plain_gpt import greedy, plain_logits
from tests.sampling import generate

GREEDY = SamplingParams(max_new_tokens=9, use_greedy=True)
STRETCHED = PositionEmbedding(
    scaling=RopeScaling(4.0, original_max_position_embeddings=16, rope_type="yarn", beta_fast=4.0)
)


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
        {
            "window_size": [14, 0],
            "window_attn_skip_freq": [0, 1],
            "attn_logit_softcapping": 2.0,
            "softmax_type": "learnable",
        },
        LATENT,
        LATENT | {"q_lora_rank": None, "softmax_type": "learnable", "window_size": [5, 0]},
        {"softmax_type": "off-by-one", "no_rope_freq": [1, 0], "position_embedding": STRETCHED},
    ],
)
def test_greedy_equals_the_full_forward_token_by_token(changes, rng, world):
    """Prompts of unequal length in one batch, several samples of each (all alike when greedy)."""
    model = build(rng, world, **changes)
    prompts = draw_prompts(rng, 13, 1, 30, 16)
    found = generate(model, prompts, 3, GREEDY)
    expected = [greedy(weights_of(model), model.model_config, p, 9, None) for p in prompts]
    assert found == [[response] * 3 for response in expected]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 12},
        {"temperature": 1.6, "top_p": 0.8},
        {"top_k": 9, "top_p": 0.9},
        {"min_p": 0.1, "repetition_penalty": 1.5},
    ],
)
def test_sampling_equals_the_full_forward_under_the_same_draws(options, rng, world):
    """Every response continues its own tokens: siblings share the prompt's cache and nothing else."""
    model = build(rng, world)
    prompts, samples = draw_prompts(rng, 11, 4), 4
    params = SamplingParams(max_new_tokens=7, **options)
    found = generate(model, prompts, samples, params, 3)
    weights = weights_of(model)
    expected: list[list[int]] = [[] for _ in range(2 * samples)]
    for i, response in enumerate(expected):
        draws = ResponseDraws((3, i // samples, i % samples))
        for j in range(7):
            text = prompts[i // samples] + response
            logits = plain_logits(weights, model.model_config, text)[-1:].float()
            uniform = torch.tensor([draws[j]], dtype=torch.float64)
            response.append(int(choose_tokens(logits, params, uniform, torch.tensor([text]))[0]))
    assert [r for rs in found for r in rs] == expected
    assert len({tuple(r) for r in expected}) > 2  # the samples do differ


def test_responses_end_with_the_stop_token(rng, world):
    """Each is cut at its own first stop token, whatever the others do; the rest is as without one."""
    model = build(rng, world)
    prompts = draw_prompts(rng, 5, 9, 2, 21)
    free = [rs[0] for rs in generate(model, prompts, 1, GREEDY)]
    stop = free[1][3]
    params = SamplingParams(9, (stop,), use_greedy=True)
    found = [rs[0] for rs in generate(model, prompts, 1, params)]
    assert found == [r[: r.index(stop) + 1] if stop in r else r for r in free]
    assert len(found[1]) <= 4 and found[1][-1] == stop


def test_the_same_seed_samples_the_same_however_prompts_are_spread(rng, world):
    """A response depends on its request alone: on no other, and on no order."""
    model = build(rng, world)
    prompts, samples = draw_prompts(rng, 7, 12, 3, 8), 3
    params = SamplingParams(max_new_tokens=6)
    whole = generate(model, prompts, samples, params, 8)
    halves = [generate(model, prompts[a:b], samples, params, 8, a) for a, b in ((0, 1), (1, 4))]
    assert whole == halves[0] + halves[1]
    requests = Request.each(prompts, samples, params, (8,))
    assert [[t.tokens for t in g] for g in MegatronSource(model).sample(requests[::-1])] == whole[::-1]
    assert generate(model, prompts, samples, params, 9) != whole


def test_log_probabilities_are_those_of_the_trained_distribution(rng, world):
    """At the temperature, before filters and penalty, whatever shaped the choice."""
    model = build(rng, world)
    (prompt,) = draw_prompts(rng, 9)
    shaped = SamplingParams(6, temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.3)
    for params in (SamplingParams(6, temperature=0.7), shaped, SamplingParams(6, use_greedy=True)):
        (found,) = MegatronSource(model).sample(Request.each([prompt], 2, params, (int(rng.initial_seed()),)))
        for trajectory in found:
            logits = plain_logits(weights_of(model), model.model_config, prompt + trajectory.tokens)
            told = (logits / params.temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = told.gather(1, torch.tensor(trajectory.tokens).unsqueeze(1)).squeeze(1)
            assert (torch.tensor(trajectory.logprobs, dtype=torch.float64) - expected).abs().max() <= 1e-5
            assert trajectory.mask == [True] * 6 and trajectory.finish_reason == "length" and trajectory.truncated


def test_each_response_has_a_limit_of_its_own_and_several_ends(rng, world):
    model = build(rng, world)
    (prompt,) = draw_prompts(rng, 6)
    (request,) = Request.each([prompt], 4, SamplingParams(9), (5,))
    (free,) = MegatronSource(model).sample([request])
    (limited,) = MegatronSource(model).sample([request.limited([1, 9, 4, 2])])
    assert [t.tokens for t in limited] == [t.tokens[:n] for t, n in zip(free, (1, 9, 4, 2), strict=True)]
    stops = (free[0].tokens[2], free[1].tokens[4])
    (ended,) = MegatronSource(model).sample(Request.each([prompt], 4, SamplingParams(9, stops), (5,)))
    for t, whole in zip(ended, free, strict=True):
        ends = [i + 1 for i, token in enumerate(whole.tokens) if token in stops]
        assert t.tokens == whole.tokens[: min(ends, default=9)]
        assert t.finish_reason == ("stop" if ends else "length")
    (never,) = MegatronSource(model).sample(Request.each([prompt], 4, SamplingParams(9, stops, ignore_eos=True), (5,)))
    assert [t.tokens for t in never] == [t.tokens for t in free]


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(rng, world):
    """Every token is two letters here, so that strings end within tokens and span them."""
    model = build(rng, world)
    (prompt,) = draw_prompts(rng, 6)

    def decode(before, tokens):
        return "".join(chr(97 + t // 8) + chr(97 + t % 8) for t in tokens)

    (free,) = generate(model, [prompt], 3, SamplingParams(20), 4)
    string = decode([], free[0])[9:14]
    found = MegatronSource(model, decode).sample(
        Request.each([prompt], 3, SamplingParams(20, (), (string, "zz")), (4,))
    )
    for t, whole in zip(found[0], free, strict=True):
        place = decode([], whole).find(string)
        assert t.tokens == (whole if place < 0 else whole[: -(-(place + 5) // 2)])
        assert t.finish_reason == ("length" if place < 0 else "stop_string")
    assert found[0][0].finish_reason == "stop_string" and len(found[0][0]) <= 7
    with pytest.raises(ValueError, match="stop_strings are looked for in text"):
        MegatronSource(model).sample(Request.each([prompt], 1, SamplingParams(3, (), ("a",))))


def test_generation_leaves_the_model_as_it_was(rng, world):
    """No gradient, no mode change, and training recomputation does not disturb it."""
    model = build(rng, world, activations_checkpoint_granularity="full")
    prompts = draw_prompts(rng, 10, 3)
    before = {name: p.clone() for name, p in model.state_dict().items() if p is not None}
    found = generate(model, prompts, 1, GREEDY)
    assert [rs[0] for rs in found] == [greedy(weights_of(model), model.model_config, p, 9, None) for p in prompts]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items() if p is not None)


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_short_responses(new_tokens, rng, world):
    model = build(rng, world)
    prompts = draw_prompts(rng, 4)
    params = SamplingParams(max_new_tokens=new_tokens, use_greedy=True)
    found = generate(model, prompts, 2, params)
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
        generate(model, [[1], []], 1, GREEDY)
    with pytest.raises(ValueError, match="prompt 0 has 8 tokens; with max_new_tokens=9.*encoder_seq_length=16"):
        generate(model, [[1] * 8], 1, GREEDY)
    assert len(generate(model, [[1] * 7], 1, GREEDY)[0][0]) == 9


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(3), SamplingParams(3, top_k=2)], ids=["greedy", "plain", "top_k"]
)
def test_a_model_that_has_diverged_is_told(params, rng, world):
    model = build(rng, world, share_embeddings_and_output_weights=False)
    with torch.no_grad():
        model.output_layer.weight[7] = float("nan")
    with pytest.raises(DivergedError, match="samples from logits that are not finite"):
        MegatronSource(model).sample([Request(draw_prompts(rng, 5)[0], 2, params)])


def requests_of_many_lengths(rng, count: int, samples: int, high: int, params: SamplingParams) -> list[Request]:
    prompts = draw_prompts(rng, *torch.randint(1, 40, (count,), generator=rng).tolist())
    requests = Request.each(prompts, samples, params, (int(rng.initial_seed()),))
    return [r.limited(torch.randint(1, high + 1, (samples,), generator=rng).tolist()) for r in requests]


@pytest.mark.parametrize("changes", [{}, {"window_size": [20, 0], "window_attn_skip_freq": 2}])
def test_a_budget_changes_nothing_that_is_said(changes, rng, world):
    """From all at once to hardly one at a time: requests wait, enter and leave, and step back when pages run out."""
    model = build(rng, world, **changes)
    params = SamplingParams(80, temperature=1.1, repetition_penalty=1.1)
    requests = requests_of_many_lengths(rng, 5, 4, 80, params)
    requests[0] = requests[0].limited([1, 1, 1, 1])  # short ones at first: more is let in than stays
    free = MegatronSource(model).sample(requests)
    alone = [MegatronSource(model).sample([request])[0] for request in requests]
    assert [[t.tokens for t in group] for group in alone] == [[t.tokens for t in group] for group in free]
    stepped_back = 0
    for pages in (24, 13, 5):
        source = MegatronSource(model, rollout_tokens=pages * PAGE + 3)
        found = source.sample(requests)
        for a, b in zip(found, free, strict=True):
            assert [t.tokens for t in a] == [t.tokens for t in b]
            for x, y in zip(a, b, strict=True):
                assert (torch.tensor(x.logprobs) - torch.tensor(y.logprobs)).abs().max() <= 1e-5
        (lane,) = source.lanes
        assert lane.pool.peak <= pages and not lane.pool.used and lane.pool.capacity <= pages
        stepped_back += lane.stepped_back
    assert stepped_back


def test_in_fp32_only_a_draw_on_the_boundary_can_choose_otherwise(rng, world):
    """All at once against one at a time: sums are taken in another order. Where the tokens part, the draw lies within 1e-5 of the
    boundary between the two; that is rare."""
    model = build(rng, world).float()
    params = SamplingParams(60, temperature=1.3)
    requests = requests_of_many_lengths(rng, 6, 4, 60, params)
    together = MegatronSource(model).sample(requests)
    alone = MegatronSource(model, rollout_tokens=5 * PAGE).sample(requests)
    weights = {name: p.double() for name, p in weights_of(model).items()}
    parted = 0
    for request, a, b in zip(requests, together, alone, strict=True):
        for sample, (x, y) in enumerate(zip(a, b, strict=True)):
            if x.tokens == y.tokens:
                continue
            parted += 1
            place = next(i for i, (s, t) in enumerate(zip(x.tokens, y.tokens, strict=True)) if s != t)
            logits = plain_logits(weights, model.model_config, [*request.prompt, *x.tokens[:place]])[-1]
            cumulative = (logits / 1.3).softmax(-1).cumsum(-1)
            low, high = sorted((x.tokens[place], y.tokens[place]))
            assert high == low + 1
            assert abs(ResponseDraws((*request.key, sample))[place] - cumulative[low]) <= 1e-5
    assert parted <= 2, f"{parted} of 24 responses"


def test_a_prompt_that_cannot_fit_is_refused_before_anything_is_sampled(rng, world):
    model = build(rng, world)
    prompts = draw_prompts(rng, 5, 40)
    words = (
        "prompt 1 has 40 tokens; with max_new_tokens=33 that is 4 pages of 32 tokens, and rollout_tokens=127 gives.* 3"
    )
    with pytest.raises(ValueError, match=words):
        generate(model, prompts, 1, SamplingParams(33), rollout_tokens=127)
    assert len(generate(model, prompts, 1, SamplingParams(32, use_greedy=True), rollout_tokens=127)[1][0]) == 32


def test_pages_are_given_back_as_responses_end(rng, world):
    """One long response beside many short ones: memory is that of the pages that are written at once."""
    model = build(rng, world)
    (request,) = Request.each(draw_prompts(rng, 20), 9, SamplingParams(97))
    source = MegatronSource(model)
    source.sample([request.limited([97] + [40] * 8)])
    # At the 33rd token two pages each; the long one, whose last token is not run, has three at its end.
    assert source.lanes[0].pool.peak == 1 + 9 * 2
    source.sample([request.limited([97] + [20] * 8)])
    assert source.lanes[0].pool.peak == 1 + 9
