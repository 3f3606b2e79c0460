"""The gradient's norm and its clipping are Megatron's own; under parallelism: tests/distributed/."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_ext.models import build_gpt
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.grad_norm import clip_gradients, gradient_norm
from megatron_ext.runtime.optim import OptimConfig
from megatron_ext.runtime.optimizer_state import single_optimizers
from tests.engine_cases import counts, grpo, make_microbatches, relative_error
from tests.gpt_cases import make_rollout, randomize, small_config

LENGTHS = [(11, [2, 7, 7]), (6, [0, 5])]


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("name", ["adam", "distributed_fused_adam"])
@pytest.mark.parametrize("share", [0.3, 1.5, 0.0], ids=["clipped", "not clipped", "no bound"])
def test_a_step_is_megatrons(share, name, precision, rng, world):
    """Of the same gradient, with a bound below its norm, above it, and none. Norms agree to the rounding of fp32 sums."""
    rollout = make_rollout(rng, LENGTHS, 61)
    microbatches = make_microbatches(rollout, [[0, 1]], counts(rollout))
    start = build_gpt(small_config(precision=precision), world)
    randomize(start, rng)
    engines = []
    for _ in range(2):
        model = build_gpt(small_config(precision=precision), world)
        model.load_state_dict(copy.deepcopy(start.state_dict()))
        engines.append(Engine(model, OptimConfig(name=name, lr=1e-2, eps=1e-3)))
        engines[-1].zero_grad()
        engines[-1].run(microbatches, grpo)
        engines[-1].optimizer.prepare_grads()
    ours, megatrons = engines
    norm = gradient_norm(ours.optimizer, world).item()
    assert norm == pytest.approx(float(megatrons.optimizer.get_grad_norm()), rel=1e-6) and norm > 0
    bound = share * norm
    ours.clip_grad = bound
    assert ours.step()["grad_norm"] == norm
    megatrons.optimizer.config.clip_grad = bound
    for single in single_optimizers(megatrons.optimizer):
        single.config.clip_grad = bound
    megatrons.optimizer.step()
    for a, b in zip(ours.module.parameters(), megatrons.module.parameters(), strict=True):
        # A last bit of the fp32 copies may become one of bf16, which is 2^-7 of a number just above a power of two.
        assert relative_error(a, b) <= (1e-6 if precision == "32" else 2**-7)


def test_a_rank_that_trains_nothing_has_a_norm(world):
    model = build_gpt(small_config(), world).requires_grad_(False)
    engine = Engine(model, OptimConfig())
    engine.optimizer.prepare_grads()
    assert gradient_norm(engine.optimizer, world).item() == 0
    clip_gradients(engine.optimizer, 2.0, 1.0)


@pytest.mark.parametrize(("norm", "largest", "factor"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (4.0, 0.0, 1.0)])
def test_gradients_are_scaled_to_the_bound(norm, largest, factor, rng, world):
    model = build_gpt(small_config(), world)
    engine = Engine(model, OptimConfig())
    engine.zero_grad()
    for parameter in model.parameters():
        parameter.main_grad.fill_(0.5)
    engine.optimizer.prepare_grads()
    clip_gradients(engine.optimizer, norm, largest)
    for single in single_optimizers(engine.optimizer):
        assert all(torch.allclose(p.grad, torch.tensor(0.5 * factor), rtol=1e-6) for p in single.get_parameters())
