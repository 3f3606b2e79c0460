"""Rows and columns that train while the rest of a parameter stays."""

from __future__ import annotations

import torch

from megatron_ext.blocks.places import parse_places
from megatron_ext.blocks.training import train_only_places
from megatron_ext.models import build_gpt
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.optimizer_state import trained_parameters
from megatron_ext.runtime.slices import SUFFIX, slice_of, write_slices
from tests.distributed.scenarios import optim
from tests.engine_cases import counts, grpo, make_microbatches
from tests.gpt_cases import make_rollout, pack_rollout, randomize, run, small_config
from tests.plain_gpt import plain_logprobs

LENGTHS = [(7, [3, 5]), (4, [6])]


def sliced(rng, world):
    """A model in fp64 of which a head of either group trains, its weights before, and a rollout."""
    model = build_gpt(small_config(), world)
    randomize(model, rng)
    model.double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = train_only_places(model, parse_places({"block": 1, "heads": [2, 5]}))
    prefix = "decoder.layers.1.self_attention."
    assert names == [
        f"{prefix}{name}{SUFFIX}" for name in ("linear_proj.weight", "linear_qkv.weight", "linear_qkv.bias")
    ]
    return model, before, make_rollout(rng, LENGTHS, 61)


def test_values_and_gradients_are_those_of_the_whole_parameter(rng, world):
    """Against the plain GPT, also when the slice has moved."""
    model, before, rollout = sliced(rng, world)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    weights = {name: value.clone() for name, value in before.items()}
    for name, parameter in trained_parameters(model).items():
        part = slice_of(parameter)
        weights[name.removesuffix(SUFFIX)].index_copy_(part.dim, part.index, parameter.detach())
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    packed = pack_rollout(rollout)
    found, _ = run(model, packed)
    expected = torch.cat([
        plain_logprobs(weights, model.model_config, prompt, response)[0]
        for prompt, responses in zip(rollout.prompts, rollout.responses, strict=True) for response in responses
    ])  # fmt: skip
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    factor = torch.randn(len(found), generator=rng, dtype=torch.float64)
    (found * factor).sum().backward()
    (expected * factor).sum().backward()
    for name, parameter in trained_parameters(model).items():
        truth = slice_of(parameter).narrowed(weights[name.removesuffix(SUFFIX)].grad)
        assert (parameter.grad - truth).abs().max() <= 1e-9 * truth.abs().max(), name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_state_dict_has_the_whole_parameter_alone(rng, world):
    model, before, _ = sliced(rng, world)
    parts = trained_parameters(model)
    with torch.no_grad():
        for parameter in parts.values():
            parameter.mul_(2)
    state = {name: value.clone() for name, value in model.state_dict().items() if "_extra_state" not in name}
    assert state.keys() == before.keys()
    for name, value in state.items():
        part = parts.get(name + SUFFIX)
        if part is None:
            assert torch.equal(value, before[name]), name
        else:
            own = slice_of(part)
            assert torch.equal(own.narrowed(value), part) and torch.equal(own.narrowed(before[name]) * 2, part), name
            assert torch.equal(
                value - own.widened(part.detach()), before[name] - own.widened(own.narrowed(before[name]))
            )
    model.load_state_dict(before, strict=False)
    for name, part in parts.items():
        assert torch.equal(part, slice_of(part).narrowed(before[name.removesuffix(SUFFIX)])), name


def test_weight_decay_and_steps_touch_the_slice_alone(rng, world):
    model = build_gpt(small_config(), world)
    randomize(model, rng)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_only_places(model, parse_places({"block": 0, "heads": [7]}))
    settings = optim()
    settings.weight_decay = 0.5
    engine = Engine(model, settings, total_steps=2)
    rollout = make_rollout(rng, LENGTHS, 61)
    for _ in range(2):
        engine.update(make_microbatches(rollout, [[0], [1]], counts(rollout)), grpo)
    write_slices(model)
    after = {name: p for name, p in model.named_parameters() if slice_of(p) is None}
    inside = {name.removesuffix(SUFFIX): slice_of(p) for name, p in trained_parameters(model).items()}
    for name, value in after.items():
        changed = value != before[name]
        if name not in inside:
            assert not changed.any(), name
        else:
            part = inside[name]
            assert not (changed & (part.widened(torch.ones_like(part.part)) == 0)).any(), name
            assert part.narrowed(changed).float().mean() > 0.9, name
