"""Adam's moments on the host: the same steps as on the device, and checkpoints that either of them loads."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.models import build_gpt
from megatron_ext.runtime.checkpoint import load_optimizer, load_weights, save_checkpoint
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.host_optimizer import HostAdamW
from megatron_ext.runtime.optim import OptimConfig, SchedConfig
from megatron_ext.runtime.optimizer_state import adam_step, single_optimizers
from tests.engine_cases import counts, grpo, make_microbatches, relative_error
from tests.gpt_cases import make_rollout, randomize, small_config

LENGTHS = [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5])]
# One kernel for all of a step rounds otherwise than one operation after the other; then gradients do, too, and in bf16 weights.
FIRST, LATER = 1e-6, {"32": 1e-5, "bf16": 2e-2}
cases = pytest.mark.parametrize("name", ["adam", "distributed_fused_adam"])
precisions = pytest.mark.parametrize("precision", ["32", "bf16"])


class Pair:
    """The same model and batch, with an engine of its own at each call."""

    def __init__(self, rng, world, name: str, precision: str):
        self.world, self.config, self.name = world, small_config(precision=precision), name
        model = build_gpt(self.config, world)
        randomize(model, rng)
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        rollout = make_rollout(rng, LENGTHS, 61)
        self.microbatches = make_microbatches(rollout, [[0, 1], [2]], counts(rollout))

    def engine(self, on_host: bool, folder=None) -> Engine:
        model = build_gpt(self.config, self.world)
        model.load_state_dict(self.weights, strict=False)
        if folder is not None:
            load_weights(folder, model)
        optim = OptimConfig(
            name=self.name, lr=1e-2, eps=1e-3, weight_decay=0.1, optimizer_cpu_offload=on_host,
            sched=SchedConfig(name="linear", warmup_steps=2),
        )  # fmt: skip
        engine = Engine(model, optim, total_steps=9)
        if folder is not None:
            load_optimizer(folder, model, engine.optimizer)
            engine.scheduler.step(increment=2)
        return engine

    def steps(self, engine: Engine, count: int) -> list[float]:
        """Losses; fewer would not see the moments."""
        return [engine.update(self.microbatches, grpo)["loss"] for _ in range(count)]


def moments(engine: Engine) -> list[HostAdamW]:
    return [single.optimizer for single in single_optimizers(engine.optimizer)]


def states(engine: Engine) -> list[torch.Tensor]:
    """Weights as the optimizer has them, and their moments."""
    found = []
    for inner in moments(engine):
        for group in inner.param_groups:
            for p in group["params"]:
                found += [p.detach().clone(), *(inner.state[p][name].clone() for name in ("exp_avg", "exp_avg_sq"))]
    return found


@cases
@precisions
def test_steps_are_those_of_the_device(name, precision, rng, world):
    """With decay, and a rate that changes. Of bf16 weights their fp32 copies are compared."""
    pair = Pair(rng, world, name, precision)
    here, there = pair.engine(on_host=False), pair.engine(on_host=True)
    for count, bound in ((2, FIRST), (3, LATER[precision])):  # the first step's rate is 0
        losses = pair.steps(here, count)  # of advantages that cancel
        assert pair.steps(there, count) == pytest.approx(losses, rel=bound, abs=bound * max(map(abs, losses)))
        for x, y in zip(states(here), states(there), strict=True):
            assert relative_error(y, x) <= bound
    assert all(isinstance(host, HostAdamW) for host in moments(there))
    assert not any(isinstance(device, HostAdamW) for device in moments(here))
    assert adam_step(there.optimizer) == adam_step(here.optimizer) == 5


@cases
@precisions
def test_its_bytes_are_two_moments_of_all_that_trains(name, precision, rng, world):
    pair = Pair(rng, world, name, precision)
    engine = pair.engine(on_host=True)
    pair.steps(engine, 1)
    numel = sum(p.numel() for p in engine.module.parameters())
    assert sum(host.nbytes for host in moments(engine)) == 8 * numel
    assert all(m.device.type == "cpu" for host in moments(engine) for s in host.state.values() for m in s.values())


@cases
@pytest.mark.parametrize(("saved", "loaded"), [(True, True), (True, False), (False, True)])
def test_checkpoints_go_from_one_to_the_other(saved, loaded, name, rng, world, tmp_path):
    pair = Pair(rng, world, name, "bf16")
    first = pair.engine(saved)
    pair.steps(first, 2)
    save_checkpoint(tmp_path / "c", first.module, {}, first.optimizer)
    second = pair.engine(loaded, tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(states(first), states(second), strict=True))
    if saved == loaded:
        assert pair.steps(second, 2) == pair.steps(first, 2)
        for (n, a), (_, b) in zip(first.module.named_parameters(), second.module.named_parameters(), strict=True):
            assert torch.equal(a, b), n


def test_a_gradient_that_is_not_finite_changes_nothing(rng, world):
    pair = Pair(rng, world, "distributed_fused_adam", "32")
    engine = pair.engine(on_host=True)
    before = [p.detach().clone() for p in engine.module.parameters()]
    with pytest.raises(UserError, match="the step was not taken"):
        engine.update(
            pair.microbatches, lambda m, logprobs, entropy: (logprobs.sum() * torch.nan, {"x": entropy.sum()})
        )
    assert all(torch.equal(a, b) for a, b in zip(engine.module.parameters(), before, strict=True))
