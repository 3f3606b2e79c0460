"""Attention, MLP and single heads: ranked against a plain GPT in fp64, one prompt at a time; and how they are named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.blocks.importance import BiasProbe, rank_blocks
from megatron_ext.blocks.places import ModelPlace, check_places, every_place, parse_places
from megatron_ext.models import PrefixGroupedGPT, build_gpt
from megatron_ext.models.config import GPTModelConfig
from tests.gpt_cases import LATENT, randomize, small_config
from tests.importance_cases import EXPERTS, PAIR, assert_close, difference, draw_probe, weights_of
from tests.plain_gpt import plain_logits

MODELS = {
    "grouped queries": {}, "latent": LATENT, "latent, queries as they are": LATENT | {"q_lora_rank": None},
    "experts": EXPERTS | {"moe_layer_freq": [0, 1]},
}  # fmt: skip
GRADIENTS = [("parts", "grouped queries"), ("parts", "experts"), *(("heads", model) for model in MODELS)]
INTERVENTIONS = [
    ("parts", "latent"),
    ("parts", "experts"),
    ("heads", "grouped queries"),
    ("heads", "latent, queries as they are"),
]


@pytest.fixture
def model(name, rng, world) -> PrefixGroupedGPT:
    built = build_gpt(small_config(**MODELS[name]), world)
    randomize(built, rng)
    return built.double()


def own_gradient(place: ModelPlace, gradients: dict[str, Tensor], config: GPTModelConfig) -> list[Tensor]:
    """What of a block's gradients belongs to the place."""
    start = f"decoder.layers.{place.block}."
    mine = {name.removeprefix(start): g for name, g in gradients.items() if name.startswith(start)}
    if not place.heads:
        in_attention = {name: name.startswith(("self_attention.", "input_layernorm.")) for name in mine}
        return [g for name, g in mine.items() if in_attention[name] == (place.part == "attention")]
    (head,), n = place.heads, config.num_attention_heads
    columns = mine["self_attention.linear_proj.weight"].unflatten(1, (n, -1))[:, head]
    if config.multi_latent_attention:
        query = mine.get("self_attention.linear_q_up_proj.weight", mine.get("self_attention.linear_q_proj.weight"))
        return [columns, query.unflatten(0, (n, -1))[head]]
    group, number = divmod(head, n // config.num_query_groups)  # query heads of a group, then its key and its value
    return [columns] + [
        mine[f"self_attention.linear_qkv.{kind}"].unflatten(0, (config.num_query_groups, -1, config.kv_channels))[group, number]
        for kind in ("weight", "bias")
    ]  # fmt: skip


@pytest.mark.parametrize(("grain", "name"), GRADIENTS)
def test_gradient(grain, model, rng):
    probe, weights, config = draw_probe(rng, prompts=6, prompts_per_gradient=3), weights_of(model), model.model_config
    places = every_place(grain, config)
    expected = torch.zeros(len(places), dtype=torch.float64)
    for first in (0, 3):
        part = probe.prompts[first : first + 3]
        loss = sum(difference(weights, config, prompt).abs() for prompt in part) / 3
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(weights, found, strict=True) if g is not None}
        for number, place in enumerate(places):
            squares = [g.square().sum() for g in own_gradient(place, gradients, config)]
            expected[number] += torch.stack(squares).sum().sqrt() / 2
    ranking = rank_blocks("gradient", model, probe, grain=grain)
    assert_close(ranking, expected)
    assert ranking.names == tuple(place.name for place in places)
    assert {places[i].block for i in ranking.excluded} == {0} and {places[i].block for i in ranking.order} == {1}


@pytest.mark.parametrize(("grain", "name"), INTERVENTIONS)
def test_intervention(grain, model, rng):
    """What a place adds, taken from the prompt with the other hint; what follows runs on."""
    probe, config = draw_probe(rng, stream_tokens=30), model.model_config
    probe = BiasProbe(probe.prompts, probe.swapped[:3], PAIR, stream_tokens=30)
    weights = {name: w.detach() for name, w in weights_of(model).items()}
    places, n = every_place(grain, config), config.num_attention_heads
    expected = torch.zeros(len(places), dtype=torch.float64)

    def asked(prompt: list[int], part) -> Tensor:
        he, she = plain_logits(weights, config, prompt, part=part)[-1].softmax(-1)[list(PAIR)]
        return he - she

    for pair in probe.swapped:
        said: list[dict[tuple[int, str], Tensor]] = [{}, {}]
        starts = [
            asked(prompt, lambda layer, name, x, known=known: known.setdefault((layer, name), x))
            for prompt, known in zip(pair, said, strict=True)
        ]
        for prompt, start, other in zip(pair, starts, reversed(said), strict=True):
            for number, place in enumerate(places):
                wanted = place.block, "heads" if place.heads else place.part

                def patched(layer, name, x, place=place, wanted=wanted, other=other):
                    if (layer, name) != wanted:
                        return x
                    if not place.heads:
                        return other[wanted]
                    x = x.unflatten(1, (n, -1)).clone()
                    x[:, place.heads[0]] = other[wanted].unflatten(1, (n, -1))[:, place.heads[0]]
                    return x.flatten(1)

                expected[number] += (asked(prompt, patched) - start).abs() / (2 * len(probe.swapped))
    assert_close(rank_blocks("intervention", model, probe, grain=grain), expected, bound=1e-6)  # logits come in fp32
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooked


def test_a_place_is_a_number_a_part_or_heads():
    assert parse_places(3) == (ModelPlace(3),)
    spec = [
        {"block": 2, "part": "mlp"},
        {"block": 2, "heads": [5, 0]},
        {"block": 1, "heads": 4},
        {"block": 0, "part": None},
    ]
    places = parse_places(spec)
    assert places == (
        ModelPlace(0),
        ModelPlace(1, "attention", (4,)),
        ModelPlace(2, "attention", (0, 5)),
        ModelPlace(2, "mlp"),
    )
    assert [place.name for place in places] == ["0", "1 head 4", "2 heads 0 5", "2 mlp"]
    assert parse_places([place.as_spec() for place in places]) == places


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "the list of places is empty"),
        ("mlp", "'mlp' is no place; name a block's number"),
        (True, "True is no place"),
        ({"block": 1, "part": "norm"}, "is no place"),
        ({"block": 1, "part": ["mlp"]}, "is no place"),
        ({"block": 1, "part": {"mlp": 1}}, "is no place"),
        ({"block": 1, "heads": [0, 0]}, "is no place"),
        ({"block": 1, "heads": []}, "is no place"),
        ({"block": 1, "part": "mlp", "heads": [1]}, "is no place"),
        ({"blocks": 1}, "is no place"),
        ([1, 1], "^'1' and '1' overlap; name each place once"),
        ([{"block": 1, "part": "mlp"}, 1], "^'1' and '1 mlp' overlap"),
        ([{"block": 1, "heads": 0}, {"block": 1, "part": "attention"}], "^'1 attention' and '1 head 0' overlap"),
        ([{"block": 1, "heads": 0}, {"block": 1, "heads": 2}], "all heads of a block in one list"),
    ],
)
def test_what_is_no_place_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_places(spec)


def test_places_that_the_model_has_not_are_refused(world):
    with pytest.raises(ValueError, match="^block 4 does not exist: the model has 4 blocks, 0 to 3$"):
        check_places(parse_places([0, {"block": 4, "part": "mlp"}]), 4, 8)
    with pytest.raises(ValueError, match="^head 8 of block 1 does not exist: a block has 8 heads, 0 to 7$"):
        check_places(parse_places({"block": 1, "heads": [7, 8]}), 4, 8)
    model, empty = build_gpt(small_config(), world), BiasProbe([], [], PAIR)
    with pytest.raises(ValueError, match="similarity compares what enters a block .* ranks no heads; take gradient or"):
        rank_blocks("similarity", model, empty, grain="heads")
    with pytest.raises(ValueError, match="'neurons' are no places to rank; there are: blocks, parts, heads"):
        rank_blocks("last", model, empty, grain="neurons")
