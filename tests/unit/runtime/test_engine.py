"""The engine on one rank: gradients, splits into microbatches, the optimizer step and its refusals."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.errors import DivergedError, UserError
from megatron_ext.grouping import unpack
from megatron_ext.models import build_gpt
from megatron_ext.runtime.engine import Engine, Microbatch, SkippedError, Skipping
from megatron_ext.runtime.optim import OptimConfig, SchedConfig
from tests.engine_cases import (
    counts,
    edges_of,
    gradient_floor,
    grpo,
    make_microbatches,
    relative_error,
    too_long_a_stream,
)
from tests.gpt_cases import make_rollout, named_gradients, pack_rollout, randomize, run, small_config
from tests.harness import run_ranks

LENGTHS = [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5]), (3, [9])]
# fp32 sums in another order: 2e-6 was the most that 40 seeds gave.
BOUND = 1e-5
optimizers = pytest.mark.parametrize("name", ["adam", "distributed_fused_adam"])


def build(rng, world, **options) -> Engine:
    model = build_gpt(small_config(), world)
    randomize(model, rng)
    return Engine(model, OptimConfig(**options.pop("optim", {})), **options)


def gradients(engine: Engine, microbatches: list[Microbatch]) -> tuple[dict, list[dict]]:
    engine.zero_grad()
    outputs = engine.run(microbatches, grpo)
    return {name: p.main_grad.clone() for name, p in engine.module.named_parameters()}, outputs


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient, gradient_floor(expected)) <= BOUND, name


@optimizers
def test_gradients_are_those_of_plain_autograd(name, rng, world):
    """No averaging, no scaling: main_grad is the sum of the microbatches' gradients."""
    engine = build(rng, world, optim={"name": name})
    rollout = make_rollout(rng, LENGTHS, 61)
    microbatches = make_microbatches(rollout, [[0, 2], [1], [3]], counts(rollout))
    found, outputs = gradients(engine, microbatches)
    losses = []
    for microbatch in microbatches:
        loss, _ = grpo(microbatch, *run(engine.module, microbatch.batch, microbatch.temperature))
        loss.backward()
        losses.append(loss.detach())
    # DDP's hooks moved these gradients to main_grad, on top of the first.
    twice = {n: p.main_grad for n, p in engine.module.named_parameters()}
    assert len(outputs) == 3 and all(torch.equal(o["loss"], x) for o, x in zip(outputs, losses, strict=True))
    assert all(torch.count_nonzero(g) for g in found.values())
    assert_same({n: 2 * g for n, g in found.items()}, twice)


def test_gradients_are_those_of_a_model_without_ddp(rng, world):
    engine = build(rng, world)
    bare = build_gpt(small_config(), world)
    bare.load_state_dict(engine.module.state_dict())
    rollout = make_rollout(rng, LENGTHS, 61)
    (microbatch,) = make_microbatches(rollout, [[0, 1, 2, 3]], counts(rollout))
    found, _ = gradients(engine, [microbatch])
    grpo(microbatch, *run(bare, microbatch.batch, microbatch.temperature))[0].backward()
    assert_same(found, named_gradients(bare))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_any_split_into_microbatches_gives_the_same_gradient(level, rng, world):
    """Loss, metrics and gradients, with a mask that leaves out tokens and an empty response."""
    engine = build(rng, world)
    while not edges_of(engine.module, rollout := make_rollout(rng, LENGTHS, 61)).clear:
        pass
    totals = counts(rollout)
    whole, outputs = gradients(engine, make_microbatches(rollout, [[0, 1, 2, 3]], totals, level))
    metrics = engine.reduce_metrics(outputs)
    assert set(metrics) == {"loss", "weight", "ratio", "clip_fraction", "kl", "entropy"}
    for cuts in ([[0], [1, 2, 3]], [[0, 1], [2], [3]], [[3], [1], [0], [2]]):
        found, outputs = gradients(engine, make_microbatches(rollout, cuts, totals, level))
        assert_same(found, whole)
        for name, value in engine.reduce_metrics(outputs).items():
            assert math.isclose(value, metrics[name], rel_tol=BOUND, abs_tol=1e-6)


def test_score_is_the_forward_pass_without_gradient(rng, world):
    """Per microbatch, and on an engine without optimizer too."""
    engine = build(rng, world)
    rollout = make_rollout(rng, LENGTHS, 61)
    microbatches = make_microbatches(rollout, [[0, 2], [1, 3]], counts(rollout))
    engine.zero_grad()
    scores = engine.score(microbatches)
    for microbatch, score in zip(microbatches, scores, strict=True):
        expected, _ = run(engine.module, microbatch.batch, microbatch.temperature)
        assert torch.equal(score, expected.detach()) and not score.requires_grad
        assert len(unpack(score, microbatch.batch.groups)) == microbatch.batch.groups.num_responses
    assert all(torch.count_nonzero(p.main_grad) == 0 for p in engine.module.parameters())
    bare = build_gpt(small_config(), world)
    bare.load_state_dict(engine.module.state_dict())
    again = Engine(bare).score(microbatches)
    assert all(torch.equal(a, b) for a, b in zip(scores, again, strict=True))


@optimizers
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_first_step_by_hand(name, clip, rng, world):
    """Adam's first step is lr * g / (|g| + eps), g being the clipped gradient: both moments are exact after bias
    correction. eps is large so that rounding of tiny gradients stays tiny."""
    lr, eps = 1e-2, 1e-3
    engine = build(rng, world, optim={"name": name, "lr": lr, "eps": eps}, clip_grad=clip)
    rollout = make_rollout(rng, LENGTHS, 61)
    found, _ = gradients(engine, make_microbatches(rollout, [[0, 1, 2, 3]], counts(rollout)))
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    report = engine.step()
    norm = math.sqrt(sum(g.double().square().sum().item() for g in found.values()))
    assert math.isclose(report["grad_norm"], norm, rel_tol=1e-5)
    assert report["lr"] == lr
    factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
    assert (factor < 1) == bool(clip)
    moved = []
    for n, p in engine.module.named_parameters():
        g = found[n].double() * factor
        expected = before[n].double() - lr * g / (g.abs() + eps)
        assert (p.double() - expected).abs().max() <= 1e-6
        moved.append((p - before[n]).abs().max().item())
    assert min(moved) > 0 and max(moved) > 1e-3  # far more than the bound


@optimizers
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_no_parameter(name, bad, rng, world):
    """And the next good step is the one that would have been taken without it."""
    engine = build(rng, world, optim={"name": name})
    rollout = make_rollout(rng, LENGTHS, 61)
    microbatches = make_microbatches(rollout, [[0, 1, 2, 3]], counts(rollout))
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.zero_grad()
    engine.run(microbatches, lambda microbatch, logprobs, entropy: (logprobs.sum() * bad, {}))
    with pytest.raises(DivergedError, match="the step was not taken"):
        engine.step()
    assert all(torch.equal(before[n], p) for n, p in engine.module.named_parameters())
    gradients(engine, microbatches)
    engine.step()
    assert all(p.isfinite().all() and not torch.equal(before[n], p) for n, p in engine.module.named_parameters())


@optimizers
def test_steps_are_left_out_until_there_are_too_many_in_a_row(name, rng, world):
    engine = build(
        rng, world, optim={"name": name, "sched": SchedConfig(warmup_steps=3)}, total_steps=9, skipping=Skipping(2)
    )
    rollout = make_rollout(rng, LENGTHS, 61)
    microbatches = make_microbatches(rollout, [[0, 1], [2, 3]], counts(rollout))

    def spoiled(microbatch, logprobs, entropy):
        loss, metrics = grpo(microbatch, logprobs, entropy)
        return loss * math.nan, metrics | {"loss": loss.detach() * math.nan}

    first = engine.update(microbatches, grpo)
    assert first["skipped"] == 0
    for _ in range(2):  # a step that is taken ends the row
        before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        for _ in range(2):
            metrics = engine.update(microbatches, spoiled)
            assert metrics["skipped"] == 1 and "loss" not in metrics and "grad_norm" not in metrics
            assert all(map(math.isfinite, metrics.values())) and len(metrics) > 3
        assert all(torch.equal(before[n], p) for n, p in engine.module.named_parameters())
        taken = engine.update(microbatches, grpo)
        assert taken["lr"] == metrics["lr"] > first["lr"], "the schedule counts steps that were taken"
        first = taken
    for _ in range(2):
        engine.update(microbatches, spoiled)
    with pytest.raises(SkippedError, match="the gradient norm is nan 3 times in a row: the step was not taken"):
        engine.update(microbatches, spoiled)


def test_a_gradient_above_the_limit_is_left_out(rng, world):
    # A rate that moves no weight, so that the norm stays what it was: behind a step it may be a fraction of that.
    engine = build(rng, world, optim={"lr": 1e-30})
    rollout = make_rollout(rng, LENGTHS, 61)
    microbatches = make_microbatches(rollout, [[0, 1, 2, 3]], counts(rollout))
    engine.zero_grad()
    engine.run(microbatches, grpo)
    norm = engine.step()["grad_norm"]
    engine.skipping = Skipping(1, above=norm * 3)

    def times(factor: float):
        def loss(*given):
            value, metrics = grpo(*given)
            return factor * value, metrics

        return loss

    assert engine.update(microbatches, times(4))["skipped"] == 1
    assert engine.update(microbatches, times(1e-3))["skipped"] == 0
    engine.update(microbatches, times(1e3))
    with pytest.raises(
        SkippedError, match=r"is [\d.e+]+, above [\d.e-]+ \(trainer.health.skip_above\) 2 times in a row"
    ):
        engine.update(microbatches, times(1e3))


def test_a_full_memory_tells_which_stream_was_too_long():
    """With as much address space as the process has, and a little more."""
    ((said, of_sampling),) = run_ranks(too_long_a_stream, 1)
    assert said.startswith(
        "memory is full at a stream of 40976 rows, of which 40960 predict: lower model.micro_batch_tokens"
    )
    assert "DefaultCPUAllocator" in said and "DefaultCPUAllocator" in of_sampling
    assert of_sampling.startswith(
        "memory is full while responses are sampled, 1 at once with keys and values of 40992 tokens: lower"
    )
    assert "trainer.grpo.rollout_tokens, which is None" in of_sampling


def test_zero_grad_forgets_the_step_before(rng, world):
    engine = build(rng, world)
    rollout = make_rollout(rng, LENGTHS, 61)
    microbatches = make_microbatches(rollout, [[0, 1], [2, 3]], counts(rollout))
    first, _ = gradients(engine, microbatches)
    second, _ = gradients(engine, microbatches)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    ("sched", "expected"),
    [
        (SchedConfig(), [1, 1, 1, 1, 1, 1]),
        # Megatron's warm-up starts from 0: the first step of one changes nothing.
        (SchedConfig(warmup_steps=2), [0, 0.5, 1, 1, 1, 1]),
        (SchedConfig("linear", decay_steps=4, min_lr=0.001), [1, 0.775, 0.55, 0.325, 0.1, 0.1]),
        (SchedConfig("linear", min_lr=0.001), [1, 0.775, 0.55, 0.325, 0.1, 0.1]),  # over the run's 4 steps
        (
            SchedConfig("CosineAnnealing", warmup_steps=1, decay_steps=3, min_lr=0.002),
            [0, 1, 0.6, 0.2, 0.2, 0.2],
        ),
    ],
)
def test_schedules(sched, expected, rng, world):
    engine = build(rng, world, optim={"lr": 0.01, "sched": sched}, total_steps=4)
    microbatch = Microbatch(pack_rollout(make_rollout(rng, [(3, [2])], 61)))
    found = []
    for _ in expected:
        engine.zero_grad()
        engine.run([microbatch], lambda microbatch, logprobs, entropy: (logprobs.sum(), {}))
        found.append(engine.step()["lr"] / 0.01)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimConfig(name="sgd"), "must be adam or distributed_fused_adam, got 'sgd'"),
        (lambda: OptimConfig(lr=0.0), "lr=0.0 must be positive"),
        (lambda: OptimConfig(betas=(0.9,)), "two numbers"),
        (lambda: OptimConfig(betas=(0.9, 1.5)), "two numbers"),
        (lambda: OptimConfig(lr=1e-4, sched=SchedConfig(min_lr=1e-3)), "must not exceed"),
        (lambda: SchedConfig(name="step"), "must be one of constant, CosineAnnealing, linear, got 'step'"),
    ],
)
def test_refuses_impossible_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "adam", "overlap_grad_reduce": True}, r"name=distributed_fused_adam \(it is adam\)"),
        ({}, r"overlap_grad_reduce=true \(it is False\)"),
    ],
)
def test_gathers_that_overlap_need_what_they_gather(keys, said):
    with pytest.raises(UserError, match=said):
        OptimConfig(overlap_param_gather=True, **keys)
