"""What lies on the host is not on the GPU, and what would help a job that does not fit is said; buckets are Megatron's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_ext.models import build_gpt
from megatron_ext.planner import HARDWARE, Assumptions, estimate
from megatron_ext.planner.buffers import lay_out, overlap_bucket
from megatron_ext.planner.parameters import stage_parameters
from megatron_ext.runtime.lean_adam import MomentStorage
from tests.gpt_cases import small_config
from tests.unit.planner.cases import job

BF16 = (torch.bfloat16, torch.bfloat16)


def test_what_is_moved_to_the_host_is_all_that_changes():
    """Of 1.2 billion parameters on one GPU: 2 bytes each of the reference, 8 of Adam's moments."""
    start = job(devices=1, groups=8, rollout_tokens=1024 + 8 * 256)
    (plain,) = estimate(start).stages
    for moved, near in (({"reference_on_host": True}, "copies"), ({"moments": MomentStorage(1.0)}, "optimizer")):
        (found,) = estimate(dataclasses.replace(start, **moved)).stages
        gone = getattr(plain, near) - getattr(found, near)
        assert gone == found.host - plain.host == 1_235_814_400 * {"copies": 2, "optimizer": 8}[near]
        assert found.total == plain.total - gone and sum(found.parts().values()) == found.total
        for other in ("parameters", "gradients", "activations", "working", "cache"):
            assert getattr(found, other) == getattr(plain, other)


def test_moving_costs_time():
    start = job(devices=1, groups=8, rollout_tokens=1024 + 8 * 256)
    plain = estimate(start).step
    reference = estimate(dataclasses.replace(start, reference_on_host=True)).step
    assert reference.scoring - plain.scoring == pytest.approx(1_235_814_400 * 2 / (64e9 * 0.75))
    optimizer = estimate(dataclasses.replace(start, moments=MomentStorage(1.0))).step
    assert optimizer.optimizer == pytest.approx(1_235_814_400 * (12 / (64e9 * 0.75) + 1e-9))
    half = estimate(dataclasses.replace(start, moments=MomentStorage(0.5))).step
    assert half.optimizer == pytest.approx(optimizer.optimizer / 2)  # the GPU is faster with the other half
    halved = estimate(dataclasses.replace(start, moments=MomentStorage(types=BF16))).step
    assert halved.optimizer == pytest.approx(plain.optimizer * 22 / 30)


def test_moments_in_bf16_and_a_share_on_the_host():
    start = job(devices=1, groups=8, rollout_tokens=1024 + 8 * 256)
    (plain,) = estimate(start).stages
    for types, each in (((torch.bfloat16, torch.float32), 6), (BF16, 4)):
        (found,) = estimate(dataclasses.replace(start, moments=MomentStorage(types=types))).stages
        assert plain.optimizer - found.optimizer == 1_235_814_400 * (8 - each) and found.host == plain.host
    (found,) = estimate(dataclasses.replace(start, moments=MomentStorage(0.25, BF16))).stages
    assert found.host - plain.host == pytest.approx(1_235_814_400, abs=4 * 1000)
    assert found.optimizer + found.host == 1_235_814_400 * 8  # fp32 weights, and moments


def test_layers_inputs_are_on_the_host_but_for_two():
    """16 layers, in a pipeline of 2 stages: 2 and 1 of the streams of 8 groups wait."""
    start = job({"pipeline_model_parallel_size": 2, "activations_checkpoint_granularity": "full"}, devices=2, groups=8)
    plain, found = estimate(start), estimate(start.laid_out(activation_offload=True))
    rows = start.largest().shape.tokens
    for number, (a, b) in enumerate(zip(plain.stages, found.stages, strict=True)):
        kept = (2 - number) * 8 * rows * 2048 * 2
        assert b.host - a.host == a.activations - b.activations == kept
        assert b.working - a.working == 2 * rows * 2048 * 2
    assert found.step.total == plain.step.total  # the copies are hidden
    slow = dataclasses.replace(HARDWARE["H100"], host_link=1e9)
    waiting = estimate(start.laid_out(activation_offload=True), slow).step
    each = 2 * 8 * rows * 2048 * 2 / (1e9 * 0.75)
    assert waiting.training == pytest.approx(8 * each) and waiting.scoring == pytest.approx(plain.step.scoring)


RECOMPUTE = "model.activations_checkpoint_granularity=full"
REFERENCE, HOST = "trainer.grpo.offload_reference_policy=true", "model.optim.optimizer_cpu_offload=true"
SHARE = f"{HOST} and model.optim.optimizer_offload_fraction="
ROUNDED = "model.optim.exp_avg_dtype=bfloat16 and model.optim.exp_avg_sq_dtype=bfloat16"


def test_the_least_that_helps_is_named():
    """The reference takes 2 bytes a number, moments 8."""
    start, none = job(devices=1, groups=8, rollout_tokens=1024 + 8 * 256), Assumptions(reserve=0)
    moves = [
        ({"reference_on_host": True}, f"{REFERENCE} or {RECOMPUTE} or {ROUNDED}"),
        ({"moments": MomentStorage(types=BF16)}, f"{REFERENCE} and {SHARE}0.25 or {ROUNDED}"),
        (
            {"reference_on_host": True, "moments": MomentStorage(0.5)},
            f"{REFERENCE} and {SHARE}0.5 or {REFERENCE} and {ROUNDED}",
        ),
        ({"reference_on_host": True, "moments": MomentStorage(0.75)}, f"{REFERENCE} and {SHARE}0.75"),
        ({"reference_on_host": True, "moments": MomentStorage(1.0)}, f"{REFERENCE} and {HOST}"),
    ]
    for move, said in moves:
        memory = estimate(dataclasses.replace(start, **move)).bytes_per_rank
        found = estimate(start, dataclasses.replace(HARDWARE["H100"], memory=memory), none)
        assert not found.fits and found.reason.endswith(f"or another layout, or {said}, with which it fits")
        short = estimate(start, dataclasses.replace(HARDWARE["H100"], memory=memory - 1), none)
        assert not short.reason.endswith(f", or {said}, with which it fits")
    assert "with which it fits" not in short.reason


@pytest.mark.parametrize("size", [1, 500, 4000, 10**9])
@pytest.mark.parametrize("tied", [True, False])
def test_buckets_of_a_size_are_megatrons(size, tied, world):
    config = small_config(num_layers=3, share_embeddings_and_output_weights=tied)
    model = build_gpt(config, world)
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=size
    )
    (buffer,) = DistributedDataParallel(model.config, options, model).buffers
    planned = lay_out(stage_parameters(config.on("cpu"), 0), 1, size)
    assert planned.numel == buffer.numel
    assert list(planned.buckets) == [(b.offset, b.offset + b.grad_data.numel()) for b in buffer.buckets]


def test_the_size_of_buckets_is_megatrons(world):
    options = DistributedDataParallelConfig(overlap_grad_reduce=True)
    DistributedDataParallel((model := build_gpt(small_config(), world)).config, options, model)
    assert options.bucket_size == overlap_bucket(1) == 40_000_000 and overlap_bucket(64) == 64_000_000
