"""Seconds of one step, estimated from operation counts, bytes and a table of hardware. Never measured on a GPU.

    step = sampling + scoring passes + updates x (forward and backward + gradients summed + optimizer) + the vision tower's passes

A pipeline of p stages runs m microbatches in the time of m + p - 1 of the slowest stage's; the p - 1 are the bubble, with v
pieces of each stage (p - 1) / v. A
scoring pass is one run, over the microbatches of all updates; training is one for each update.
Sampling goes through the stages one after the other, token by token. While the tower runs, on the first stage, nothing else is
taken to, which is an upper bound with several stages.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.flops import Flops, model_flops, num_tokens
from megatron_ext.planner.activations import projected_width
from megatron_ext.planner.communication import Traffic, data_traffic, neighbours, pass_traffic, ring
from megatron_ext.planner.hardware import Assumptions, Hardware
from megatron_ext.planner.job import Job, MicrobatchShape
from megatron_ext.planner.memory import sampled_together
from megatron_ext.planner.parameters import stage_parameters, trained_of_stage, weights_train
from megatron_ext.planner.tower import tower_flops

__all__ = ["StepTime", "step_time"]

FP32 = 4


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by phase; they add up.

    Attributes:
        sampling, scoring, training: computation and its communication, without the bubble.
        bubble: stages waiting for each other while scoring and training.
        data: gradients summed over data-parallel ranks, and parameters told.
        optimizer: the update itself.
        tower: all passes of the vision tower, sampling's too.
        sent: kind -> bytes that one rank sends.
        flops: operations of all ranks, sampling and the tower excepted.
        tokens: that go through the layers when trained on, over all ranks.
    """

    sampling: float
    scoring: float
    training: float
    bubble: float
    data: float
    optimizer: float
    tower: float
    sent: dict[str, float]
    flops: float
    tokens: int

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        names = ("sampling", "tower", "scoring", "training", "bubble", "data", "optimizer")
        return {name: value for name in names if (value := getattr(self, name))}


def step_time(job: Job, hardware: Hardware, assumptions: Assumptions) -> StepTime:
    """Estimate of one step of `job`."""
    clock = _Clock(job, hardware, assumptions)
    batch, updates, stages = job.microbatches, job.updates, job.model.pipeline_model_parallel_size
    forward, both = ([clock.microbatch(m, backward) for m in batch] for backward in (False, True))
    passes = job.scoring_passes * updates  # of an update's microbatches
    # Of a stage in pieces it waits for one piece at a time.
    waits = (stages - 1) / job.model.pipeline_split.pieces
    bubble = waits * (job.scoring_passes * max(forward) + updates * max(both))
    summed = [data_traffic(job, stage) for stage in range(stages)]
    sent: dict[str, float] = {}
    for microbatch in batch:
        for traffic in (
            *(t.times(passes) for t in pass_traffic(job, microbatch, False)),
            *(t.times(updates) for t in pass_traffic(job, microbatch, True)),
        ):
            sent[traffic.kind] = sent.get(traffic.kind, 0) + traffic.sent
    for traffic in max(summed, key=lambda found: sum(t.sent for t in found)):
        sent[traffic.kind] = sent.get(traffic.kind, 0) + updates * traffic.sent
    counted = [model_flops(job.shape, m.lengths, job.share_prefix) for m in batch]
    scored = [model_flops(job.shape, m.lengths, job.share_prefix, backward=False) for m in batch]
    flops = updates * sum(f.total for f in counted) + passes * sum(f.total for f in scored)
    return StepTime(
        sampling=clock.sampling() if job.rollout else 0.0,
        scoring=passes * sum(forward) + updates * clock.reference(),
        training=updates * sum(both),
        bubble=bubble,
        data=updates * max(sum(clock.link(t) for t in found) for found in summed),
        optimizer=updates * clock.optimizer(),
        tower=clock.tower(),
        sent=sent,
        flops=job.data_parallel * flops,
        tokens=job.data_parallel * updates * sum(num_tokens(m.lengths, job.share_prefix) for m in batch),
    )


class _Clock:
    def __init__(self, job: Job, hardware: Hardware, assumptions: Assumptions):
        self.job, self.hardware, self.assumed = job, hardware, assumptions
        self._known: dict = {}

    def link(self, traffic: Traffic) -> float:
        start = self.assumed.collective_latency + self.assumed.ring_latency * (traffic.ranks - 1)
        speed = traffic.bandwidth(self.hardware) * self.assumed.link_efficiency
        return traffic.sent / speed + traffic.collectives * start

    def read(self, size: float) -> float:
        """Seconds to read or write so many bytes of memory."""
        return size / (self.hardware.memory_bandwidth * self.assumed.memory_efficiency)

    def compute(self, flops: Flops, layers: float) -> float:
        """Of one rank of the slowest stage, which has that share of the layers, and the vocabulary."""
        config, peak = self.job.model, self.hardware.flops
        ranks = config.tensor_model_parallel_size * config.context_parallel_size
        gain = self.assumed.fp8_gain if config.fp8 is not None else 1.0
        linear = (flops.linear * layers / gain + flops.vocabulary) / (peak * self.assumed.linear_efficiency)
        return (linear + flops.attention * layers / (peak * self.assumed.attention_efficiency)) / ranks

    def tower(self) -> float:
        """Each rank has it whole, in the model's precision; FP8 is of the language model's layers."""
        flops, peak = tower_flops(self.job, self.assumed.frame_patches), self.hardware.flops
        linear = flops.linear / (peak * self.assumed.linear_efficiency)
        return linear + flops.attention / (peak * self.assumed.attention_efficiency)

    def microbatch(self, microbatch: MicrobatchShape, backward: bool) -> float:
        key = (id(microbatch), backward)
        if key not in self._known:
            job = self.job
            share = max(job.model.pipeline_split.counts()) / job.model.num_layers
            flops = model_flops(job.shape, microbatch.lengths, job.share_prefix, backward)
            without = model_flops(job.shape, microbatch.lengths, job.share_prefix, backward=False)
            if backward and job.model.activations_checkpoint_granularity == "full":
                flops = Flops(flops.linear + without.linear, flops.attention + without.attention, flops.vocabulary)
            elif backward and job.model.activations_checkpoint_granularity == "selective":
                flops = Flops(flops.linear, flops.attention * 4 / 3, flops.vocabulary)
            # Each chunk of logits but the last is computed again in backward.
            if backward and not weights_train(job.model):  # no products for the gradients of frozen weights
                flops = Flops(flops.linear - without.linear, flops.attention, flops.vocabulary - without.vocabulary)
            if backward:
                flops = Flops(flops.linear, flops.attention, flops.vocabulary * 4 / 3)
            sent = sum(self.link(t) for t in pass_traffic(job, microbatch, backward))
            self._known[key] = max(self.compute(flops, share) + sent, self.offloading(microbatch) if backward else 0.0)
        return self._known[key]

    def offloading(self, microbatch: MicrobatchShape) -> float:
        """Layers' inputs on their way to the host and back, while the pass runs; of the slowest stage."""
        config = self.job.model
        if not config.activation_offload:
            return 0.0
        rows = microbatch.shape.tokens // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        sent = 2 * max(config.pipeline_split.counts()) * rows * config.hidden_size * config.dtype.itemsize
        return sent / (self.hardware.host_link * self.assumed.link_efficiency)

    def reference(self) -> float:
        """The copy of the reference policy's weights from the host, of the stage that has most."""
        job = self.job
        if not (job.reference_copy and job.reference_on_host):
            return 0.0
        stages = range(job.model.pipeline_model_parallel_size)
        count = max(sum(p.numel for p in trained_of_stage(job.model, stage, blocks=0)) for stage in stages)
        return count * job.model.dtype.itemsize / (self.hardware.host_link * self.assumed.link_efficiency)

    def optimizer(self) -> float:
        """State is read and written once, by the rank that holds it: two moments, weights, gradient, parameter."""
        job = self.job
        held = lambda p: (job.expert_replicas if p.expert else job.replicas) if job.distributed_optimizer else 1  # noqa: E731
        count = max(
            sum(p.numel / held(p) for p in trained_of_stage(job.model, stage, job.blocks))
            for stage in range(1 if job.blocks else job.model.pipeline_model_parallel_size)
        )
        there = count * job.moments.on_host  # gradient and weight go to the host, the weight back
        moved = 3 * FP32 * there / (self.hardware.host_link * self.assumed.link_efficiency)
        moments = sum(dtype.itemsize for dtype in job.moments.types)
        read = self.read((count - there) * (2 * (moments + FP32) + FP32 + job.model.dtype.itemsize))
        return moved + max(there / self.assumed.host_updates, read)

    def sampling(self) -> float:
        """Prefill, then one token after the other: what has room together, then the next, as if all were of full length."""
        job, config = self.job, self.job.model
        together = sampled_together(job)
        local = -(-job.local_groups * job.updates // config.context_parallel_size)
        batches = -(-local // together)
        rows = together * job.samples
        tp, stages, e = config.tensor_model_parallel_size, config.pipeline_model_parallel_size, config.dtype.itemsize
        prompts = [(job.prompt, [])] * together
        prefill = self.compute(model_flops(job.shape, prompts, True, backward=False), 1) * config.context_parallel_size
        read = (p for s in range(stages) for p in stage_parameters(config, s) if not p.sees)
        weights = sum(p.numel for p in read) * e
        per_token = config.cached_channels * e * config.num_layers
        # A prompt's keys are read once for all its responses, where they lie; a response's as far as it is said.
        held = per_token * (together * job.prompt + rows * job.response / 2)
        # Experts get the rows of all ranks that share them, of each row what it takes.
        taken = config.moe_router_topk * config.expert_model_parallel_size / (config.num_moe_experts or 1)
        here = (p for s in range(stages) for p in stage_parameters(config, s))
        flops = 2 * rows * sum(p.numel * (taken if p.expert else 1) for p in here)
        busy = max(self.read(weights + held), flops / (self.hardware.flops * self.assumed.linear_efficiency))
        launch = config.num_layers * self.assumed.decode_kernels * self.assumed.kernel_launch
        logits = self.read(rows * config.padded_vocab_size * (4 * FP32 + 4 * 8))
        told = 0.0
        if config.expert_model_parallel_size > 1:
            calls = 2 * sum(config.layers_with_experts)  # to the experts and back
            sent = calls * -(-rows // tp) * config.moe_router_topk * config.hidden_size * e
            told += self.link(ring(job, "expert", sent, calls, exchange=True))
        if tp > 1:
            calls = 2 * config.num_layers  # all-reduces, one after attention and one after the MLP
            told += self.link(ring(job, "tensor", calls * 2 * rows * config.hidden_size * e, calls))
        if config.shares_key_value_heads:
            calls = config.num_layers
            told += self.link(ring(job, "tensor", calls * rows * projected_width(config) * e, calls))
        if stages > 1:
            told += (stages * config.pipeline_split.pieces - 1) * self.link(
                neighbours(job, rows * config.hidden_size * e, 1)
            )
        # Kernels are launched ahead of the GPU: the slower of the two counts.
        return batches * (prefill + job.response * (max(busy, launch) + logits + told))
