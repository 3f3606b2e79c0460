"""A GPT that sees images and videos: every scheme, grouped and repeated, trained and sampled, against plain PyTorch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_ext.grouping import PrefixGroups
from megatron_ext.models import build_gpt
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.models.media import MediaPrompt, next_position, pack_prompts, stream_positions
from megatron_ext.rollouts import SamplingParams
from megatron_ext.rotary import SCHEMES, SharedText, Text, Video, layout
from megatron_ext.vision import VisionConfig
from tests.gpt_cases import named_gradients, randomize, small_config
from tests.layouts import error
from tests.media_cases import FEATURES, cases
from tests.plain_gpt import greedy, plain_logprobs
from tests.sampling import generate

BOUND = 1e-10
# The others differ from one of these by a formula alone: here are one and several axes, whole ids and others, seconds, and pairs
# that nothing turns.
SEEN = ("rope", "mrope", "videorope", "vrope", "qwen2_5_vl", "hope(stride=0.75)", "v2pe(stride=5)", "circle_rope")
schemes = pytest.mark.parametrize("scheme", SEEN)


def build(rng, world, scheme: str, **changes):
    model = build_gpt(media_config(scheme, **changes), world)
    randomize(model, rng)
    return model.double()


def media_config(scheme: str, **changes):
    return small_config(vision=VisionConfig(FEATURES), position_embedding=PositionEmbedding(scheme), **changes)


def run(model, batch):
    return model(batch.tokens, batch.position_ids, batch.groups, labels=batch.labels, media=batch.media)


@schemes
def test_grouped_equals_repeated_and_a_plain_gpt(scheme, rng, world):
    """fp64, log-probabilities and every gradient, the projector's included."""
    model = build(rng, world, scheme)
    prompts, responses = cases(rng)
    for group in responses:  # trees, too
        group[-1][:1] = group[0][:1]
    results = []
    for how in ({}, {"min_shared": 1}, {"share_prefix": False}):
        batch = pack_prompts(prompts, responses, scheme, 16, **how)
        logprobs, _ = run(model, batch)
        factors = torch.linspace(-1, 1, len(logprobs), dtype=torch.float64)
        (logprobs * factors).sum().backward()
        results.append((logprobs.detach(), named_gradients(model)))
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    parts = [
        plain_logprobs(weights, model.model_config, p, r)[0]
        for p, rs in zip(prompts, responses, strict=True)
        for r in rs
    ]
    plain = torch.cat(parts)
    (plain * factors).sum().backward()
    results.append((plain.detach(), {name: w.grad for name, w in weights.items()}))
    for logprobs, gradients in results[1:]:
        assert error(results[0][0], logprobs) <= BOUND
        for name, gradient in results[0][1].items():
            assert torch.count_nonzero(gradient) and error(gradient, gradients[name]) <= BOUND, name


@pytest.mark.parametrize("scheme", sorted(SCHEMES.keys() - {"hope"}))
def test_text_only_is_the_plain_rope_model_bitwise(scheme, rng, world):
    plain = build_gpt(small_config(), world)
    randomize(plain, rng)
    model = build_gpt(small_config(position_embedding=media_config(scheme).position_embedding), world)
    model.load_state_dict(plain.state_dict())
    tokens = torch.randint(60, (40,), generator=rng)
    groups = PrefixGroups.from_lengths([(11, [7, 9]), (5, [8])])
    for ids in (groups.position_ids, stream_positions(groups, [[1] * 11, [1] * 5], scheme)):
        found = model(tokens, ids, groups, labels=tokens[groups.target_index])
        expected = plain(tokens, groups.position_ids, groups, labels=tokens[groups.target_index])
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@schemes
def test_decoding_continues_from_the_next_index(scheme, rng, world):
    """Greedy tokens equal the whole document run again for every token: the index is less than the token count."""
    model = build(rng, world, scheme)
    prompts, _ = cases(rng)
    found = generate(model, prompts, 2, SamplingParams(6, use_greedy=True))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert found == [[greedy(weights, model.model_config, p, 6, None)] * 2 for p in prompts]
    assert next_position(prompts[0], "vrope") == 3 + 2 * 4 + 2 < len(prompts[0])


@schemes
def test_positions_of_a_stream_are_those_of_each_continuation(scheme, rng):
    prompts, responses = cases(rng)
    batch = pack_prompts(prompts, responses, scheme, 16)
    row = 0
    for prompt, group in zip(prompts, responses, strict=True):
        items = prompt.items if isinstance(prompt, MediaPrompt) else [Text(len(prompt))]
        table = layout([*items, *(SharedText(len(r)) for r in group)], scheme)
        length = table.ids.size(1)
        assert torch.equal(batch.position_ids[:, row : row + length], table.ids)
        row += length
    assert batch.groups.num_tokens - row == batch.groups.num_pad_tokens


@pytest.mark.parametrize("granularity", [None, "full"])
def test_the_embedding_is_built_once_for_all_layers(granularity, rng, world):
    model = build(rng, world, "vrope", activations_checkpoint_granularity=granularity)
    calls = []
    model.rotary_pos_emb.register_forward_hook(lambda *args: calls.append(1))
    prompts, responses = cases(rng)
    logprobs, _ = run(model, pack_prompts(prompts, responses, "vrope"))
    logprobs.sum().backward()
    assert len(calls) == 1 and model.model_config.num_layers == 2


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_prompts_features_are_projected_once(share_prefix, rng, world):
    """Though the repeated layout has its video once for every response; a prompt without responses is not there at all."""
    model = build(rng, world, "vrope")
    prompts, responses = cases(rng)
    projected = []
    model.media_projector.register_forward_hook(lambda module, inputs, out: projected.append(inputs[0]))
    batch = pack_prompts(prompts, responses, "vrope", share_prefix=share_prefix)
    run(model, batch)
    assert torch.equal(torch.cat(projected), torch.cat([prompts[0].content, prompts[2].content]))
    standing = [prompts[i].content for i in (0, 2) for _ in range(1 if share_prefix else len(responses[i]))]
    assert torch.equal(batch.media.content[batch.media.index], torch.cat(standing))
    alone = pack_prompts(prompts[:2], [[], responses[1]], "vrope", share_prefix=share_prefix)
    assert (alone.media is None) == (not share_prefix)


def test_the_video_matters_and_so_does_where_its_tokens_stand(rng, world):
    model = build(rng, world, "vrope")
    prompts, responses = cases(rng)
    before, _ = run(model, pack_prompts(prompts, responses, "vrope"))
    other = MediaPrompt(prompts[0].tokens, prompts[0].items, prompts[0].content.flip(0))
    after, _ = run(model, pack_prompts([other, *prompts[1:]], responses, "vrope"))
    first = sum(map(len, responses[0]))
    assert bool((before[:first] != after[:first]).all()) and torch.equal(before[first:], after[first:])
    batch = pack_prompts(prompts, responses, "vrope")
    placed, _ = run(model, dataclasses.replace(batch, scheme_ids=batch.scheme_ids.flip(0)))
    assert bool((before[:first] != placed[:first]).any())


@pytest.mark.parametrize(
    ("tokens", "media", "features", "words"),
    [
        ([60, 60, 1], [Video(1, 1, 3)], 3, r"2 placeholder tokens, its media \(1 x 1 x 3\) have 3"),
        ([60, 60, 60], [Video(1, 1, 2)], 2, "3 placeholder tokens, its media .* have 2"),
        ([60, 1], [], 0, r"1 placeholder tokens, its media \(none\) have 0"),
        ([60, 60], [Video(1, 1, 2)], 3, r"have 2 tokens, features are \(3, 12\)"),
        ([60, 1, 60], [Video(1, 1, 2)], 2, "text stands among the 2 placeholders"),
    ],
)
def test_refuses_placeholders_that_do_not_fit(tokens, media, features, words):
    with pytest.raises(ValueError, match=words):
        MediaPrompt.of(tokens, 60, media, torch.zeros(features, FEATURES))


def test_refuses_media_without_eyes(rng, world):
    model = build_gpt(small_config(position_embedding=media_config("vrope").position_embedding), world)
    prompts, responses = cases(rng)
    with pytest.raises(ValueError, match="the stream has media, but the model has no model.vision"):
        run(model, pack_prompts(prompts, responses, "vrope"))
