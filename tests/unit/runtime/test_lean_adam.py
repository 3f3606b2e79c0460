"""Adam's moments on the host or in bf16: steps are the device's, or torch's with rounded moments; any checkpoint is loaded."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.models import build_gpt
from megatron_ext.runtime.checkpoint import load_optimizer, load_weights, save_checkpoint
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.lean_adam import HOST, LeanAdamW, MomentStorage
from megatron_ext.runtime.optim import OptimConfig, SchedConfig
from megatron_ext.runtime.optimizer_state import adam_step, single_optimizers
from tests.engine_cases import counts, make_microbatches, relative_error, smooth
from tests.gpt_cases import make_rollout, randomize, small_config
from tests.layouts import randn

LENGTHS = [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5])]
# One kernel for all of a step rounds otherwise than one operation after the other; then gradients do, too, and in bf16 weights.
FIRST, LATER = 1e-6, {"32": 1e-5, "bf16": 2e-2}
cases = pytest.mark.parametrize("name", ["adam", "distributed_fused_adam"])
precisions = pytest.mark.parametrize("precision", ["32", "bf16"])
DEVICE: dict = {}
ALL_HOST = {"optimizer_cpu_offload": True}
SOME_HOST = ALL_HOST | {"optimizer_offload_fraction": 0.3}
ROUNDED = {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}
LEAN = (ALL_HOST, SOME_HOST, ROUNDED, SOME_HOST | ROUNDED)


class Pair:
    """The same model and batch, with an engine of its own at each call."""

    def __init__(self, rng, world, name: str, precision: str):
        self.world, self.config, self.name = world, small_config(precision=precision), name
        model = build_gpt(self.config, world)
        randomize(model, rng)
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        rollout = make_rollout(rng, LENGTHS, 61)
        self.microbatches = make_microbatches(rollout, [[0, 1], [2]], counts(rollout))

    def engine(self, keys: dict, folder=None) -> Engine:
        model = build_gpt(self.config, self.world)
        model.load_state_dict(self.weights, strict=False)
        if folder is not None:
            load_weights(folder, model)
        optim = OptimConfig(
            name=self.name,
            lr=1e-2,
            eps=1e-3,
            weight_decay=0.1,
            sched=SchedConfig(name="linear", warmup_steps=2),
            **keys,
        )
        engine = Engine(model, optim, total_steps=9)
        if folder is not None:
            load_optimizer(folder, model, engine.optimizer)
            engine.scheduler.step(increment=2)
        return engine

    def steps(self, engine: Engine, count: int) -> list[float]:
        """Losses; fewer would not see the moments."""
        return [engine.update(self.microbatches, smooth)["loss"] for _ in range(count)]


def inners(engine: Engine) -> list:
    return [single.optimizer for single in single_optimizers(engine.optimizer)]


def states(engine: Engine) -> list[torch.Tensor]:
    """Weights as the optimizer has them, and their moments, flat."""
    found = []
    for inner in inners(engine):
        for p in (p for group in inner.param_groups for p in group["params"]):
            kept = inner.moments(p) if isinstance(inner, LeanAdamW) else inner.state[p]
            found += [p.detach().flatten().clone(), *(kept[m].flatten().clone() for m in ("exp_avg", "exp_avg_sq"))]
    return found


@cases
@precisions
@pytest.mark.parametrize("keys", [ALL_HOST, SOME_HOST], ids=["all", "some"])
def test_steps_are_those_of_the_device(keys, name, precision, rng, world):
    """With decay, and a rate that changes. Of bf16 weights their fp32 copies are compared."""
    pair = Pair(rng, world, name, precision)
    here, there = pair.engine(DEVICE), pair.engine(keys)
    for count, bound in ((2, FIRST), (3, LATER[precision])):  # the first step's rate is 0
        losses = pair.steps(here, count)  # of advantages that cancel
        assert pair.steps(there, count) == pytest.approx(losses, rel=bound, abs=bound * max(map(abs, losses)))
        for x, y in zip(states(here), states(there), strict=True):
            assert relative_error(y, x) <= bound
    assert all(isinstance(host, LeanAdamW) for host in inners(there))
    assert not any(isinstance(device, LeanAdamW) for device in inners(here))
    assert adam_step(there.optimizer) == adam_step(here.optimizer) == 5


@pytest.mark.parametrize("on_host", [0.0, 0.4])
@pytest.mark.parametrize("rounded", [0, 1, None])
def test_steps_are_torchs_with_rounded_moments(on_host, rounded, rng):
    """Against torch's own AdamW whose moments are rounded after each step. Of the host's part another kernel rounds fp32."""
    types = [torch.bfloat16 if rounded in (None, number) else torch.float32 for number in (0, 1)]
    start = randn(rng, 7, 33).float()
    mine, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    lean = LeanAdamW(torch.optim.AdamW([mine], **options), MomentStorage(on_host, tuple(types)))
    reference = torch.optim.AdamW([plain], foreach=False, **options)
    for _ in range(6):
        gradient = randn(rng, 7, 33).float()
        mine.grad, plain.grad = gradient.clone(), gradient.clone()
        lean.step()
        reference.step()
        for moment, dtype in zip(("exp_avg", "exp_avg_sq"), types, strict=True):
            state = reference.state[plain][moment]
            state.copy_(state.to(dtype))
        cut = int(on_host * start.numel())
        weights = mine.detach().flatten(), plain.detach().flatten()
        assert torch.equal(weights[0][cut:], weights[1][cut:])
        for moment in ("exp_avg", "exp_avg_sq"):
            found, expected = lean.moments(mine)[moment], reference.state[plain][moment].flatten()
            assert torch.equal(found[cut:], expected[cut:])
            if cut:  # a last bit of fp32 may become one of bf16, 2^-7 of a number just above a power of two
                assert relative_error(found[:cut], expected[:cut]) <= 2**-7
        if cut:
            assert relative_error(weights[0][:cut], weights[1][:cut]) <= 1e-3
    assert lean.state[mine]["exp_avg"].dtype == types[0] and lean.state[mine][HOST + "exp_avg_sq"].dtype == types[1]


def test_a_decay_that_bf16_does_not_see_is_refused(rng):
    """The rule is what bf16 does: just above a power of two numbers stay under a slower decay than is allowed."""
    for decay, still in ((1 - 2**-8 + 1e-4, True), (1 - 2**-8 - 1e-4, False)):
        x = 2.0 ** torch.arange(-20, 5).to(torch.bfloat16) * (1 + 2**-7 * torch.arange(1, 2))
        fallen = (x.float() * decay).to(torch.bfloat16)
        assert torch.equal(fallen, x.to(torch.bfloat16)) == still
    with pytest.raises(UserError, match=r"exp_avg_sq_dtype=bfloat16 needs a decay of at most 1 - 1/256 .* has 0.999"):
        OptimConfig(exp_avg_sq_dtype="bfloat16", betas=(0.9, 0.999))
    OptimConfig(exp_avg_dtype="bfloat16", betas=(0.9, 0.999))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"exp_avg_dtype": "float16"}, "exp_avg_dtype must be one of float32, bfloat16, got 'float16'"),
        ({"optimizer_offload_fraction": 0.5}, "needs model.optim.optimizer_cpu_offload=true"),
        (ALL_HOST | {"optimizer_offload_fraction": 0.0}, r"must lie in \(0, 1\]"),
        (ALL_HOST | {"optimizer_offload_fraction": 1.5}, r"must lie in \(0, 1\]"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys, said):
    with pytest.raises(UserError, match=said):
        OptimConfig(**keys)


@cases
@precisions
def test_its_bytes_are_two_moments_of_all_that_trains(name, precision, rng, world):
    for keys, each in ((ALL_HOST, 8), (ALL_HOST | ROUNDED, 4), (ALL_HOST | {"exp_avg_dtype": "bfloat16"}, 6)):
        pair = Pair(rng, world, name, precision)
        engine = pair.engine(keys)
        pair.steps(engine, 1)
        numel = sum(p.numel() for p in engine.module.parameters())
        kept = [x for inner in inners(engine) for s in inner.state.values() for n, x in s.items() if n != "step"]
        assert sum(x.nbytes for x in kept) == each * numel
        assert all(x.device.type == "cpu" for x in kept)


PAIRS = [(a, b) for a in (DEVICE, *LEAN) for b in (DEVICE, *LEAN) if a or b]


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_checkpoints_go_from_one_to_the_other(saved, loaded, rng, world, tmp_path):
    """All is bitwise the same where no type is narrower, and rounded once where one is."""
    name = "adam" if ROUNDED.keys() <= loaded.keys() else "distributed_fused_adam"
    pair = Pair(rng, world, name, "bf16")
    first = pair.engine(saved)
    pair.steps(first, 2)
    save_checkpoint(tmp_path / "c", first.module, {}, first.optimizer)
    second = pair.engine(loaded, tmp_path / "c")
    narrower = ROUNDED.keys() <= loaded.keys() and not ROUNDED.keys() <= saved.keys()
    for number, (a, b) in enumerate(zip(states(first), states(second), strict=True)):
        assert torch.equal(a.bfloat16().float() if narrower and number % 3 else a, b)
    assert adam_step(second.optimizer) == 2
    if saved == loaded:
        assert pair.steps(second, 2) == pair.steps(first, 2)
        for (n, a), (_, b) in zip(first.module.named_parameters(), second.module.named_parameters(), strict=True):
            assert torch.equal(a, b), n


def test_a_gradient_that_is_not_finite_changes_nothing(rng, world):
    pair = Pair(rng, world, "distributed_fused_adam", "32")
    engine = pair.engine(SOME_HOST | ROUNDED)
    before = [p.detach().clone() for p in engine.module.parameters()]
    with pytest.raises(UserError, match="the step was not taken"):
        engine.update(
            pair.microbatches, lambda m, logprobs, entropy: (logprobs.sum() * torch.nan, {"x": entropy.sum()})
        )
    assert all(torch.equal(a, b) for a, b in zip(engine.module.parameters(), before, strict=True))
