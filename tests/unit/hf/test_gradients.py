"""Gradients of a loss through every parameter, of shared prompts here and of repeated ones in transformers; also where tokens
take the experts that they took there."""

from __future__ import annotations

import functools
import re
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ext.grouping.routes import Routes, stream_routes, write_routes
from megatron_ext.hf.held import placed_parameters
from megatron_ext.models import PrefixGroupedGPT
from tests.gpt_cases import Rollout, make_rollout, pack_rollout, run
from tests.hf_folders import imported
from tests.hf_models import FAMILY_CASES, VOCAB, all_in_fp64, make_hf_model, published_gradients
from tests.layouts import randn

BOUND = 1e-9  # 1e-13 is what was seen
SINGLE = 1e-6  # of what is stored in fp32
LENGTHS = [(11, [5, 7, 3]), (4, [9, 2])]


Found = tuple[Tensor, dict[str, Tensor]]  # log-probabilities [r], and gradients


def in_transformers(
    folder, rollout, factors: list[Tensor], routes: list[str] | None = None, worst: bool = False
) -> Found:
    """Of sum(factor * log-probability) over response tokens, a response at a time.

    Args:
        routes: gets those of every response, as a vLLM server tells them.
        worst: tokens take the experts that their routers like least.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    taken: dict[int, Tensor] = {}

    def routed(gate, args, out, layer: int):
        logits, weights, experts = out
        if worst:
            experts = logits.topk(gate.top_k, largest=False).indices
            weights = logits.softmax(-1).gather(1, experts)
            if getattr(gate, "norm_topk_prob", True):  # Mixtral's always does
                weights = weights / weights.sum(-1, keepdim=True)
        taken[layer] = experts
        return logits, weights, experts

    gates = {i: getattr(layer.mlp, "gate", None) for i, layer in enumerate(model.model.layers)}
    for number, gate in gates.items():
        if routes is not None and gate is not None:
            gate.register_forward_hook(functools.partial(routed, layer=number))
    found = []
    with all_in_fp64():
        for (prompt, response), factor in zip(rollout.flat, factors, strict=True):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1))
            (found[-1] * factor).sum().backward()
            if routes is not None:
                nothing = torch.zeros_like(next(iter(taken.values())))
                told = torch.stack([taken.get(number, nothing) for number in gates], 1)  # [tokens, l, k]
                routes.append(write_routes(told[:-1].numpy().astype(np.uint8)))
    return torch.cat(found).detach(), published_gradients(model)


def here(
    folder, world, rollout, factors: list[Tensor], shapes: dict[str, Tensor], routes: list[str] | None = None
) -> Found:
    """The same of our model; gradients in tensors of theirs."""
    model, batch = imported(folder, world).double(), pack_rollout(rollout)
    model.config.params_dtype = torch.float64  # of the tables of cosines and sines
    if routes is not None:
        shape = model.model_config.route_shape
        read = [shape.read(text, len(p) + len(r)) for text, (p, r) in zip(routes, rollout.flat, strict=True)]
        Routes.given(batch.groups, stream_routes(batch.groups, read, shape.layers, shape.topk))
    with all_in_fp64():
        logprobs, _ = run(model, batch)
        (logprobs * torch.cat(factors)).sum().backward()
    return logprobs.detach(), by_their_names(model, shapes)


def by_their_names(model: PrefixGroupedGPT, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our gradients in tensors of theirs."""
    found = {name: torch.full_like(x, torch.nan) for name, x in shapes.items()}
    for name, parameter, entry, layer in placed_parameters(model):
        if name.endswith("expert_bias"):  # which no gradient moves
            continue
        for hf_slice in entry.slices(layer, model.model_config, 0):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            part = hf_slice.within(gradient)
            found[hf_slice.name][hf_slice.index] = part.reshape(found[hf_slice.name][hf_slice.index].shape)
    return found


def assert_same(ours: Found, theirs: Found) -> None:
    """An expert without tokens has no gradient on either side; of every layer some have one."""
    assert (ours[0] - theirs[0]).norm() <= BOUND * theirs[0].norm() and ours[1].keys() == theirs[1].keys()
    sizes = defaultdict(float)
    for key, expected in theirs[1].items():
        bound = BOUND if expected.dtype == torch.float64 else SINGLE  # newer transformers keep some routers in fp32
        assert (ours[1][key] - expected).norm() <= bound * expected.norm(), key
        sizes[re.sub(r"experts\.\d+", "experts", key)] += float(expected.norm())
    assert all(sizes.values()), sizes


def drawn(rng) -> tuple[Rollout, list[Tensor]]:
    """Prompts with responses, and a factor for every response token."""
    rollout = make_rollout(rng, LENGTHS, VOCAB)
    return rollout, [randn(rng, len(response)) for _, response in rollout.flat]


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_every_gradient_is_that_of_transformers(name, tmp_path, world, rng):
    """fp64 throughout."""
    make_hf_model(tmp_path, name, rng)
    rollout, factors = drawn(rng)
    theirs = in_transformers(tmp_path, rollout, factors)
    assert_same(here(tmp_path, world, rollout, factors, theirs[1]), theirs)


@pytest.mark.parametrize("worst", [False, True], ids=["its choice", "its worst"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "qwen2_moe"])
def test_the_routes_of_transformers_are_followed(name, worst, tmp_path, world, rng):
    """Also where a router would choose others: then experts that it likes best would say something else."""
    make_hf_model(tmp_path, name, rng)
    rollout, factors = drawn(rng)
    routes: list[str] = []
    theirs = in_transformers(tmp_path, rollout, factors, routes, worst)
    assert_same(here(tmp_path, world, rollout, factors, theirs[1], routes), theirs)
    free, _ = here(tmp_path, world, rollout, factors, theirs[1])
    assert ((free - theirs[0]).abs().max() > 1e-3) == worst
