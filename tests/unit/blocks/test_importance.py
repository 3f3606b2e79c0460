"""BMI estimators against a plain GPT in fp64, one prompt at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.bias.ranking import BlockRanking
from megatron_ext.blocks.importance import ESTIMATORS, BiasProbe, rank_blocks
from megatron_ext.models import PrefixGroupedGPT, build_gpt
from tests.gpt_cases import randomize, small_config
from tests.importance_cases import EXPERTS, PAIR, assert_close, difference, draw_probe, weights_of
from tests.plain_gpt import plain_logits

LAYERS = 4


def build(rng, world, **fields) -> PrefixGroupedGPT:
    model = build_gpt(small_config(num_layers=LAYERS, **fields), world)
    randomize(model, rng)
    return model.double()


with_and_without_experts = pytest.mark.parametrize("fields", [{}, EXPERTS], ids=["dense", "experts"])


@with_and_without_experts
def test_similarity(fields, rng, world):
    model = build(rng, world, **fields)
    probe, weights = draw_probe(rng, stream_tokens=40), weights_of(model)
    expected = torch.zeros(LAYERS, dtype=torch.float64)

    def measure(layer: int, before: Tensor, after: Tensor) -> Tensor:
        x, y = before[-1].detach(), after[-1].detach()
        expected[layer] += 1 - (x @ y) / (x.norm() * y.norm())
        return after

    for prompt in probe.prompts:
        plain_logits(weights, model.model_config, prompt, visit=measure)
    assert_close(rank_blocks("similarity", model, probe), expected / len(probe.prompts))


@with_and_without_experts
def test_gradient(fields, rng, world):
    """The norm over the block's parameters of the gradient of |P(he) - P(she)|, averaged over parts of the prompts."""
    model = build(rng, world, **fields)
    probe, weights = draw_probe(rng, prompts=12, prompts_per_gradient=4), weights_of(model)
    expected = torch.zeros(LAYERS, dtype=torch.float64)
    for first in (0, 4, 8):
        part = probe.prompts[first : first + 4]
        loss = sum(difference(weights, model.model_config, prompt).abs() for prompt in part) / 4
        found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)  # some experts get no token
        gradients = dict(zip(weights, found, strict=True))
        for layer in range(LAYERS):
            squares = [g.square().sum() for name, g in gradients.items() if f"layers.{layer}." in name]
            expected[layer] += torch.stack(squares).sum().sqrt() / 3
    assert_close(rank_blocks("gradient", model, probe), expected)


@with_and_without_experts
def test_intervention(fields, rng, world):
    """What a block adds, taken from the prompt with the other hint; what follows runs on."""
    model = build(rng, world, **fields)
    probe, config = draw_probe(rng, stream_tokens=30), model.model_config
    weights = {name: w.detach() for name, w in weights_of(model).items()}
    expected = torch.zeros(LAYERS, dtype=torch.float64)
    for pair in probe.swapped:
        added = [added_by_blocks(weights, config, prompt) for prompt in pair]
        for prompt, other in zip(pair, reversed(added), strict=True):
            start = difference(weights, config, prompt)
            for chosen in range(LAYERS):

                def exchange(layer, before, after, other=other, chosen=chosen):
                    return before + other[layer] if layer == chosen else after

                moved = difference(weights, config, prompt, exchange) - start
                expected[chosen] += moved.abs() / (2 * len(probe.swapped))
    assert_close(rank_blocks("intervention", model, probe), expected, bound=1e-6)  # its logits come in fp32


def added_by_blocks(weights, config, prompt: list[int]) -> list[Tensor]:
    """H_out - H_in of every block, [s, h]."""
    added: list[Tensor] = []

    def record(layer: int, before: Tensor, after: Tensor) -> Tensor:
        added.append(after - before)
        return after

    plain_logits(weights, config, prompt, visit=record)
    return added


def test_controls(rng, world):
    model = build(rng, world)
    assert rank_blocks("last", model, draw_probe(rng)).order == (3, 2, 1)
    orders = {rank_blocks("random", model, draw_probe(rng, seed=seed)).order for seed in range(20)}
    assert len(orders) > 3 and orders <= {(a, b, 6 - a - b) for a in (1, 2, 3) for b in (1, 2, 3) if a != b}
    again = [rank_blocks("random", model, draw_probe(rng, seed=4)).order for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_model_is_left_as_it_was(name, rng, world):
    model = build(rng, world)
    model.decoder.final_layernorm.weight.requires_grad_(False)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    rank_blocks(name, model, draw_probe(rng))
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] and p.grad is None, n
    assert not any(layer._forward_hooks for layer in model.decoder.layers)


def test_pairs_of_unequal_length_are_left_out(rng, world):
    model, probe = build(rng, world), draw_probe(rng)
    more = BiasProbe(probe.prompts, [([1, 2, 3], [1, 2]), *probe.swapped], PAIR)
    assert rank_blocks("intervention", model, more) == rank_blocks("intervention", model, probe)


def test_refusals(rng, world):
    model = build(rng, world)
    empty = BiasProbe([], [([1, 2], [3])], PAIR)
    for name, message in (
        ("similarity", "similarity needs prompts, and there is none"),
        ("gradient", "gradient needs prompts, and there is none"),
        ("intervention", "pairs of prompts of equal length .* of 1 none is"),
        (
            "entropy",
            "BMI estimator 'entropy' does not exist; there are: similarity, gradient, intervention, random, last",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            rank_blocks(name, model, empty)
    with pytest.raises(ValueError, match="all 4 blocks are excluded"):
        rank_blocks("last", model, empty, exclude=range(4))
    with pytest.raises(ValueError, match="block 9 does not exist: the model has 4 blocks"):
        rank_blocks("last", model, empty, exclude=[9])
    with pytest.raises(ValueError, match="^block 2 is excluded twice; name each block once$"):
        rank_blocks("last", model, empty, exclude=[0, 2, 1, 2])


@pytest.mark.parametrize("name", ["similarity", "gradient", "intervention"])
def test_a_diverged_model_is_not_ranked(name, rng, world):
    model = build(rng, world)
    model.decoder.layers[1].mlp.linear_fc2.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=rf"^estimator {name} gives block [01] the score nan: the model has diverged"):
        rank_blocks(name, model, draw_probe(rng))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_must_be_finite(bad):
    """Of excluded blocks, too: their scores are shown."""
    message = (
        f"estimator gradient gives block 0 the score {bad}: the model has diverged, or its numbers overflow; rank a "
        "checkpoint from before that"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        BlockRanking.of("gradient", [bad, 1.0, 2.0], exclude=[0])


def test_ranking():
    ranking = BlockRanking.of("gradient", [9.0, 0.5, 2.0, 2.0], exclude=[0])
    assert ranking.order == (2, 3, 1) and ranking.best == 2 and ranking.excluded == (0,)
    assert ranking.markdown().splitlines()[2:] == [
        "| 1 | 2 | 2 |", "| 2 | 3 | 2 |", "| 3 | 1 | 0.5 |", "| excluded | 0 | 9 |"
    ]  # fmt: skip
    assert ranking.as_dict()["best"] == 2
