"""The reference policy on the host says bitwise what it says on the device, and takes no room there."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.models import build_gpt
from megatron_ext.planner import Job
from megatron_ext.planner.memory import stage_memory
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.optim import OptimConfig
from megatron_ext.runtime.reference import ReferenceWeights
from tests.engine_cases import counts, grpo, make_microbatches
from tests.gpt_cases import make_rollout, randomize, small_config

LENGTHS = [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5]), (3, [9])]


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adam", "distributed_fused_adam"])
@pytest.mark.parametrize("tied", [True, False])
def test_on_the_host_it_says_bitwise_the_same(optimizer, precision, tied, rng, world):
    config = small_config(precision=precision, share_embeddings_and_output_weights=tied)
    model = build_gpt(config, world)
    randomize(model, rng)
    engine = Engine(model, OptimConfig(name=optimizer, lr=1e-2))
    near, far = ReferenceWeights(engine), ReferenceWeights(engine, on_host=True)
    rollout = make_rollout(rng, LENGTHS, 61)
    microbatches = make_microbatches(rollout, [[0, 1], [2], [3]], counts(rollout))
    expected = engine.score(microbatches)
    engine.update(microbatches, grpo)
    moved = engine.score(microbatches)
    own = [p.data_ptr() for p in model.parameters()]
    results = []
    for reference in (near, far):
        with reference.used():
            results.append(engine.score(microbatches))
            places = {p.untyped_storage().data_ptr() for p in model.parameters()}
            buffers = {b.grad_data.untyped_storage().data_ptr() for b in engine.pieces[0].buffers}
            assert (places == buffers) == reference.on_host  # in the gradients' place, nowhere else
    for before, now, of_near, of_far in zip(expected, moved, *results, strict=True):
        assert torch.equal(of_near, before) and torch.equal(of_far, before)
        assert not torch.equal(now, before)
    assert [p.data_ptr() for p in model.parameters()] == own
    assert all(torch.equal(a, b) for a, b in zip(engine.score(microbatches), moved, strict=True))


def test_gradients_after_it_are_those_without_it(rng, world):
    """It leaves nothing of itself in the buffers, also where nobody clears them."""
    model = build_gpt(small_config(), world)
    randomize(model, rng)
    engine = Engine(model, OptimConfig())
    rollout = make_rollout(rng, LENGTHS, 61)
    microbatches = make_microbatches(rollout, [[0, 1], [2, 3]], counts(rollout))
    engine.zero_grad()
    engine.run(microbatches, grpo)
    expected = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    with ReferenceWeights(engine, on_host=True).used():
        engine.score(microbatches)
    engine.run(microbatches, grpo)
    assert all(torch.equal(p.main_grad, expected[name]) for name, p in model.named_parameters())


def test_its_own_weights_come_back_after_an_error(rng, world):
    engine = Engine(build_gpt(small_config(), world), OptimConfig())
    own = [p.data_ptr() for p in engine.module.parameters()]
    for on_host in (False, True):
        with pytest.raises(KeyError), ReferenceWeights(engine, on_host).used():
            assert [p.data_ptr() for p in engine.module.parameters()] != own
            raise KeyError
        assert [p.data_ptr() for p in engine.module.parameters()] == own


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_its_bytes_are_planned(precision, world):
    config = small_config(precision=precision)
    engine = Engine(build_gpt(config, world), OptimConfig())
    for on_host in (False, True):
        job = Job(
            config.on("cpu"), 1, 1, groups=4, prompt=5, response=7, reference_copy=True, reference_on_host=on_host
        )
        planned = stage_memory(job, 0)
        kept = ReferenceWeights(engine, on_host).nbytes
        assert (planned.copies, planned.host) == ((0, kept) if on_host else (kept, 0))
