"""Adapters on the small GPT: sharing a prefix and computing again change nothing, and without them it is the frozen model."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.adapters import LoraConfig, adapted_linears, adapter_parameters, merged, without_adapters
from megatron_ext.adapters.config import LINEARS
from megatron_ext.errors import UserError
from megatron_ext.models import build_gpt
from megatron_ext.runtime.distributed import set_seed
from tests.edges import Edges
from tests.gpt_cases import (
    LATENT,
    make_rollout,
    named_gradients,
    objective,
    pack_rollout,
    randomize,
    run,
    small_config,
)
from tests.layouts import error
from tests.lora_cases import LATENT_TARGETS, TARGETS, draw_adapters

BOUND = 1e-10
LENGTHS = [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5])]
EXPERTS = {
    "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_layer_freq": [0, 1],
    "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
PLAIN = {"q_lora_rank": None}
models = pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in TARGETS),
        ("nemo", EXPERTS),
        ("latent", LATENT | EXPERTS),
        ("latent, some", LATENT | PLAIN),
    ],
    ids=[*TARGETS, "experts", "latent", "latent without compressed queries"],
)


few = pytest.mark.parametrize(
    ("kind", "changes"), [("nemo", {}), ("nemo", EXPERTS), ("latent", LATENT)], ids=["dense", "experts", "latent"]
)


def lora(kind: str = "nemo", **changes) -> LoraConfig:
    targets, _, rslora = (TARGETS | LATENT_TARGETS)[kind]
    return LoraConfig(**{"dim": 3, "alpha": 5.0, "target_modules": targets, "rslora": rslora} | changes)


def build(rng, world, kind: str = "nemo", **changes):
    model = build_gpt(small_config(peft=lora(kind), **changes), world)
    randomize(model, rng)
    draw_adapters(model, rng)
    return model


def gradients(model, rollout, batch) -> dict[str, torch.Tensor]:
    logprobs, entropy = run(model, batch)
    objective(rollout, batch.groups, logprobs, entropy).backward()
    found = named_gradients(model)
    adapters = adapter_parameters(model)
    assert all((gradient is not None) == (name in adapters) for name, gradient in found.items())
    return {"logprobs": logprobs.detach()} | {name: found[name] for name in adapters}


@models
@pytest.mark.parametrize("common", [0, 4], ids=["groups", "trees"])
def test_grouped_equals_repeated(kind, changes, common, rng, world):
    model = build(rng, world, kind, **changes).double()
    rollout = make_rollout(rng, LENGTHS, 61, common)
    shared, repeated = (gradients(model, rollout, pack_rollout(rollout, share)) for share in (True, False))
    for name, value in shared.items():
        assert torch.count_nonzero(value) or ".local_experts." in name, name
        assert value.dtype == torch.float64 and error(value, repeated[name]) <= BOUND, name


@few
@pytest.mark.parametrize("granularity", ["selective", "full", "on the host"])
def test_recompute_equals_none_bitwise(granularity, kind, changes, rng, world):
    """Also of the first layer, whose input has no gradient of its own."""
    offload = granularity == "on the host"
    keys = {"activations_checkpoint_granularity": "full" if offload else granularity, "activation_offload": offload}
    plain = build(rng, world, kind, **changes)
    again = build_gpt(small_config(peft=lora(kind), **keys, **changes), world)
    again.load_state_dict(plain.state_dict())
    rollout = make_rollout(rng, LENGTHS, 61)
    batch = pack_rollout(rollout)
    found, expected = gradients(again, rollout, batch), gradients(plain, rollout, batch)
    assert any("layers.0." in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(value, found[name]) and (torch.count_nonzero(value) or ".local_experts." in name), name


@models
def test_by_hand(kind, changes, rng, world):
    """Beside y = W x + scale B A x of each of Hugging Face's linears, written down for the fused linears."""
    model = build(rng, world, kind, **changes).double()
    config, scale = model.model_config, 5 / (math.sqrt(3) if lora(kind).rslora else 3)
    assert config.peft.scale == pytest.approx(scale)
    for name, linear in adapted_linears(model).items():
        x = torch.randn(7, 1, linear.input_size, generator=rng, dtype=torch.float64)
        kept = dict(linear.lora.named_parameters())
        branch_of = {part: b for b, parts in linear.lora.shape.branches.items() for part in parts}

        def added(part: str, x=x, kept=kept, branch_of=branch_of, rows=linear.lora.shape.rows) -> torch.Tensor:
            if part not in branch_of:
                return torch.zeros(7, 1, rows[part], dtype=torch.float64)
            return scale * x @ kept[f"a_{branch_of[part]}"].t() @ kept[f"b_{part}"].t()

        if name.endswith("linear_qkv"):  # queries of a group, its key, its value
            q, k, v = (added(p).view(7, 1, config.num_query_groups, -1) for p in ("q_proj", "k_proj", "v_proj"))
            expected = torch.cat([q, k, v], -1).flatten(2)
        else:
            expected = torch.cat([added(part) for part in linear.lora.shape.rows], -1)
        base = x @ linear.weight.t()
        base = base if linear.bias is None else base + linear.bias
        assert error(linear(x)[0], base + expected) <= BOUND, name
        assert error(linear.merged_weight(), linear.weight + linear.lora.delta()) <= 1e-6


@few
def test_a_new_adapter_changes_nothing(kind, changes, rng, world):
    """Bitwise; and without adapters the model is the frozen one, whatever they have learnt."""
    plain = build_gpt(small_config(**changes), world)
    randomize(plain, rng)
    model = build_gpt(small_config(peft=lora(kind), **changes), world)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == adapter_parameters(model).keys() and not unexpected
    batch = pack_rollout(make_rollout(rng, LENGTHS, 61))
    with torch.no_grad():
        expected, _ = run(plain, batch)
        assert torch.equal(run(model, batch)[0], expected)
        draw_adapters(model, rng)
        assert error(run(model, batch)[0], expected) > 1e-2
        with without_adapters(model):
            assert torch.equal(run(model, batch)[0], expected)
        assert error(run(model, batch)[0], expected) > 1e-2


@models
def test_merged_and_back(kind, changes, rng, world):
    clear = False
    while not clear:
        model = build(rng, world, kind, **changes)
        batch = pack_rollout(make_rollout(rng, LENGTHS, 61))
        with torch.no_grad(), Edges("topk") as edges:
            run(model, batch)
        clear = edges.clear
    before = {name: value.clone() for name, value in model.state_dict().items() if value is not None}
    with torch.no_grad():
        expected, _ = run(model, batch)
        with pytest.raises(ZeroDivisionError), merged(model):
            found, _ = run(model, batch)
            changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
            assert len(changed) == len(adapted_linears(model))
            raise ZeroDivisionError
    assert error(found, expected) <= 1e-4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if value is not None)
    with torch.no_grad():
        assert torch.equal(run(model, batch)[0], expected)


@pytest.mark.parametrize(
    ("init", "deviation", "largest"),
    [
        ("kaiming", 1 / math.sqrt(3 * 512), 1 / math.sqrt(512)),
        ("gaussian", 1 / 256, math.inf),
        ("xavier", 0.0510, math.inf),
    ],
)
def test_a_is_drawn_and_b_is_0(init, deviation, largest, world):
    """Each A is another, the same for the same seed."""
    found = []
    for seed in (1, 1, 2):
        set_seed(seed)
        peft = LoraConfig(dim=256, init=init, target_modules=["q_proj", "k_proj"])
        model = build_gpt(small_config(hidden_size=512, kv_channels=8, peft=peft), world)
        found.append({name: p.detach() for name, p in adapter_parameters(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    drawn = [value for some in (found[0], found[2]) for name, value in some.items() if ".a_" in name]
    assert len(drawn) == 8 and all(not torch.equal(x, y) for i, x in enumerate(drawn) for y in drawn[:i])
    for a in drawn:
        assert a.std().item() == pytest.approx(deviation, rel=0.02) and a.abs().max() <= largest
    assert not any(value.any() for name, value in found[0].items() if ".b_" in name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "dora"}, "model.peft.name must be lora, got 'dora'"),
        ({"dim": 0}, "model.peft.dim=0 must be at least 1"),
        ({"alpha": 0.0}, "model.peft.alpha=0.0 must be above 0"),
        ({"dropout": 0.1}, "dropped once per group, not once per response"),
        ({"init": "pissa"}, "model.peft.init must be one of kaiming, gaussian, xavier, got 'pissa'"),
        ({"saved_as": "both"}, "model.peft.saved_as must be one of adapter, merged"),
        ({"target_modules": []}, "model.peft.target_modules is empty"),
        ({"target_modules": ["lm_head"]}, "'lm_head' is no linear of a layer; there are linear_qkv,"),
        ({"target_modules": ["linear_qkv", "q_proj"]}, "linear_qkv and q_proj both adapt q_proj"),
        ({"target_modules": ["o_proj", "linear_proj"]}, "o_proj and linear_proj both adapt o_proj"),
        ({"target_modules": ["q_proj", "q_proj"]}, "q_proj and q_proj both adapt q_proj"),
    ],
)
def test_adapters_that_cannot_be_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        LoraConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformer_impl": "transformer_engine"}, "its linears have no adapters here; set it to local"),
        ({"gradient_accumulation_fusion": True}, "is for weights that train, and with model.peft they are frozen"),
        ({"fp8": "hybrid", "precision": "bf16"}, "adapters are not computed in 8 bits"),
        (
            LATENT,
            "target_modules: linear_qkv is no linear of this model, whose layers have linear_q_down_proj, linear_q_up",
        ),
        (
            LATENT | PLAIN | {"peft": lora("latent")},
            "linear_q_down_proj, linear_q_up_proj is no linear of this model, whose",
        ),
        (
            {"peft": LoraConfig(target_modules=["kv_b_proj", "o_proj"])},
            "kv_b_proj is no linear .* layers have linear_qkv, lin",
        ),
        (
            {"tensor_model_parallel_size": 4, "num_query_groups": 1, "kv_channels": 6},
            "does not divide the 6 rows of keys",
        ),
        (
            EXPERTS | {"peft": LoraConfig(target_modules=["q_proj", "up_proj"])},
            "target_modules has up_proj, and the model experts .* are one tensor with one A .*; name linear_fc1 instead",
        ),
        (
            EXPERTS | {"moe_grouped_gemm": True},
            "moe_grouped_gemm=true puts experts into one product .* set it to false",
        ),
        (
            EXPERTS | {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 1e-3},
            "moe_router_bias_update_rate=0.001 moves experts' biases, which model.peft freezes .*; set it to 0",
        ),
    ],
)
def test_models_that_have_none_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        small_config(**{"peft": lora()} | changes)


def test_experts_without_tokens_have_no_gradients(rng, world):
    """Zeros; those that all tokens take, by their biases, have some."""
    one = {"moe_layer_freq": 1, "moe_router_topk": 1, "moe_router_enable_expert_bias": True}
    model = build(rng, world, **EXPERTS | one).double()
    rollout = make_rollout(rng, LENGTHS, 61)
    chosen = torch.randint(4, (2,), generator=rng).tolist()
    for layer, expert in zip(model.decoder.layers, chosen, strict=True):
        layer.mlp.router.expert_bias[expert] = 10
    found = gradients(model, rollout, pack_rollout(rollout))
    for name, value in found.items():
        if ".local_experts." in name:
            layer, expert = (int(name.split(".")[i]) for i in (2, 6))
            assert bool(torch.count_nonzero(value)) == (expert == chosen[layer]) and value.isfinite().all(), name


@pytest.mark.parametrize(
    "changes", [{}, EXPERTS, LATENT, LATENT | PLAIN], ids=["dense", "experts", "latent", "uncompressed"]
)
def test_a_model_has_the_parts_that_adapters_know_of(changes):
    linears = {name: one for some in small_config(**changes).linears.values() for name, one in some.items()}
    assert {name: LINEARS[name] for name in linears} == {name: tuple(one.rows) for name, one in linears.items()}


def test_names():
    """What stands for what: NeMo's names and PEFT's."""
    peft = LoraConfig(target_modules=["linear_proj", "down_proj", "k_proj", "linear_fc1"])
    assert peft.parts == ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert peft.branches("linear_qkv") == {"k_proj": ("k_proj",)}
    assert peft.branches("linear_proj") == {"linear_proj": ("o_proj",)}
    assert peft.branches("linear_fc1") == {"linear_fc1": ("gate_proj", "up_proj")}
    assert peft.branches("linear_fc2") == {"down_proj": ("down_proj",)}
    assert LoraConfig().target_modules == ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
