"""Closed-form edits and steering against plain linear algebra and a plain GPT, in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.blocks.editing import edit_mlp, rank_one_edit
from megatron_ext.blocks.importance import BiasProbe
from megatron_ext.blocks.steering import find_steering, steered
from megatron_ext.models import build_gpt
from megatron_ext.models.prompt_streams import next_token_probabilities
from tests.gpt_cases import randomize, small_config
from tests.importance_cases import EXPERTS, PAIR, VOCAB, draw_probe, weights_of
from tests.plain_gpt import plain_logits

BLOCK = 1


@pytest.fixture(params=[{"num_layers": 3}, {"num_layers": 4} | EXPERTS], ids=["dense", "experts"])
def model(request, rng, world):
    built = build_gpt(small_config(**request.param), world)
    randomize(built, rng)
    return built.double()


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def test_the_edit_is_the_least_squares_solution(rng):
    """Of the stacked system that it says it solves."""
    keys, differences, direction, others, weight = draw(rng, 9, 6), draw(rng, 9), draw(rng, 4), draw(rng, 30, 6), 0.3
    rows = torch.cat([keys / len(keys) ** 0.5, others * (weight / len(others)) ** 0.5])
    wanted = torch.cat([-differences / len(keys) ** 0.5, torch.zeros(30, dtype=torch.float64)])
    expected = torch.outer(direction, torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0])
    found = rank_one_edit(keys, differences, direction, others, weight, ridge=0)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert torch.linalg.matrix_rank(found) == 1


def test_of_one_key_it_is_romes(rng):
    """Equation 2: the value behind the key becomes what was wanted, by the update along C^-1 k."""
    key, direction, others = draw(rng, 1, 6), draw(rng, 4), draw(rng, 30, 6)
    inverse = torch.linalg.inv(others.t() @ others / 30) @ key[0]
    expected = torch.outer(-0.7 * direction, inverse) / (inverse @ key[0])
    # A weight of the others that is far above rounding, which is divided by it, and far below what a short key would show.
    found = rank_one_edit(key, torch.tensor([0.7]), direction, others, 1e-8, ridge=0)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found @ key[0] + 0.7 * direction).abs().max() <= 1e-6


def test_behind_the_prompt_the_mlp_takes_newtons_step(model, rng):
    """What it gives there moves by the gap between the words over the squared length of its slope; nothing else is edited."""
    prompt = torch.randint(VOCAB, (7,), generator=rng).tolist()
    texts = [torch.randint(VOCAB, (12,), generator=rng).tolist() for _ in range(6)]
    block = 0 if model.config.num_moe_experts else BLOCK  # the one with an MLP
    before, name = weights_of(model), f"decoder.layers.{block}.mlp.linear_fc2.weight"
    given = {}

    def keep(layer, part, x):
        return given.setdefault((layer, part), x)

    said = plain_logits(before, model.model_config, prompt, part=keep)[-1].log_softmax(-1)
    gap, added = said[PAIR[0]] - said[PAIR[1]], given[block, "mlp"]
    slope = torch.autograd.grad(gap, added, retain_graph=True)[0][-1]
    key = torch.autograd.grad(added[-1, 0], before[name])[0][0]
    edit_mlp(model, block, [prompt], PAIR, texts, weight=1e-9)
    after = weights_of(model)
    assert [n for n in before if not torch.equal(before[n], after[n])] == [name]
    step = ((after[name] - before[name]) @ key).detach()
    expected = (-gap / slope.square().sum() * slope).detach()
    assert (step - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_steering_is_the_projection_of_a_plain_gpt(model, rng):
    probe, config, weights = draw_probe(rng, stream_tokens=30), model.model_config, weights_of(model)
    left: list[torch.Tensor] = []

    def record(layer, before, after):
        if layer == BLOCK:
            left.append(after[-1].detach())
        return after

    for pair in probe.swapped:
        for prompt in pair:
            plain_logits(weights, config, prompt, visit=record)
    first, second = torch.stack(left[::2]).mean(0), torch.stack(left[1::2]).mean(0)
    direction = (first - second) / (first - second).norm()
    found = find_steering(model, BLOCK, probe)
    assert (found.direction - direction).abs().max() <= 1e-9
    assert float(found.middle) == pytest.approx(float((first + second) @ direction / 2), rel=1e-9)

    def project(layer, before, after):
        if layer != BLOCK:
            return after
        along = after @ direction - (first + second) @ direction / 2
        return after - 0.5 * torch.outer(along, direction)

    with steered(model, found, strength=0.5):
        said = next_token_probabilities(model, probe.prompts[:4], PAIR)
    for row, prompt in zip(said, probe.prompts, strict=False):
        expected = plain_logits(weights, config, prompt, visit=project)[-1].softmax(-1)[list(PAIR)]
        assert (row - expected).abs().max() <= 1e-6 * expected.max() + 1e-9
    assert not any(layer._forward_hooks for layer in model.decoder.layers)


def test_refusals(model):
    layers = model.model_config.num_layers
    with pytest.raises(ValueError, match=f"block {layers} does not exist"):
        edit_mlp(model, layers, [[1]], PAIR, [[1, 2]])
    with pytest.raises(ValueError, match="needs prompts, and neutral texts"):
        edit_mlp(model, 0, [[1]], PAIR, [])
    with pytest.raises(ValueError, match="steering needs pairs of prompts"):
        find_steering(model, 0, BiasProbe([[1]], [], PAIR))
    if model.config.num_moe_experts:
        with pytest.raises(
            ValueError, match="^block 1 has experts, and a closed-form edit is of one MLP: choose another"
        ):
            edit_mlp(model, 1, [[1]], PAIR, [[1, 2]])
