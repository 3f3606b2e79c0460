"""Does it fit, and how long does it take: one call for tools and launchers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_ext.flops import LEAST_SPEEDUP
from megatron_ext.planner.hardware import GIB, Assumptions, Hardware, find_hardware
from megatron_ext.planner.job import Job
from megatron_ext.planner.memory import StageMemory, stage_memory
from megatron_ext.planner.time import StepTime, step_time
from megatron_ext.runtime.lean_adam import MomentStorage

__all__ = ["Estimate", "Grouping", "estimate", "grouping_gain"]

SHARES = (0.25, 0.5, 0.75, 1.0)  # of Adam's moments
BF16_MOMENTS = (torch.bfloat16, torch.bfloat16)
BF16_KEYS = "model.optim.exp_avg_dtype=bfloat16 and model.optim.exp_avg_sq_dtype=bfloat16"


@dataclass(frozen=True)
class Estimate:
    """What a job needs.

    Attributes:
        fits: whether every rank's bytes and the reserve stay within the GPU's memory.
        bytes_per_rank: of the fullest rank, without the reserve.
        reason: one line that says so, with the numbers and, where it does not fit, the largest part.
        stages: memory of every pipeline stage.
        step: estimated time of a step; never measured.
    """

    job: Job
    hardware: Hardware
    assumptions: Assumptions
    stages: tuple[StageMemory, ...]
    step: StepTime

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def bytes_per_rank(self) -> int:
        return self.fullest.total

    @property
    def fits(self) -> bool:
        return self.bytes_per_rank + self.assumptions.reserve <= self.hardware.memory

    @property
    def reason(self) -> str:
        job, m = self.job, self.job.model
        layout = (
            f"TP {m.tensor_model_parallel_size} x PP {m.pipeline_model_parallel_size} x CP {m.context_parallel_size} x "
            f"DP {job.data_parallel} on {job.nodes} x {job.devices} {self.hardware.name}"
        )
        room = self.hardware.memory - self.assumptions.reserve
        numbers = f"{self.bytes_per_rank / GIB:.1f} GiB per rank of {room / GIB:.1f} GiB ({layout})"
        if self.fits:
            return f"fits: {numbers}"
        parts = self.fullest.parts()
        most = max(parts, key=parts.get)
        helps = " or ".join(self._what_helps())
        return (
            f"does not fit: {numbers}; {parts[most] / GIB:.1f} GiB of it are {most}; use more nodes or another layout"
            + (f", or {helps}, with which it fits" if helps else "")
        )

    def _what_helps(self) -> list[str]:
        """Keys with which the job fits: of each kind of change the least that does."""
        found = (
            next((keys for job, keys in kind if self._would_fit(job)), None) for kind in _kinds_of_change(self.job)
        )
        return [keys for keys in found if keys is not None]

    def _would_fit(self, job: Job) -> bool:
        room = self.hardware.memory - self.assumptions.reserve
        return all(stage_memory(job, stage.stage).total <= room for stage in self.stages)


def _kinds_of_change(job: Job) -> Iterator[Iterator[tuple[Job, str]]]:
    """What lies on the host, what is computed again, and what rounds Adam's moments; each from less to more, with the keys that
    say so."""
    on_host = job.moments.on_host
    shares = [(MomentStorage(share, job.moments.types), _share_keys(share)) for share in SHARES if share > on_host]
    yield _with_reference(job, [(job.moments, ""), *shares])
    if not job.blocks:  # frozen layers below it leave it no gradient then
        yield _less_of_activations(job)
    if job.moments.types != BF16_MOMENTS:
        yield _with_reference(job, [(MomentStorage(on_host, BF16_MOMENTS), BF16_KEYS)])


def _less_of_activations(job: Job) -> Iterator[tuple[Job, str]]:
    keys = []
    if job.model.activations_checkpoint_granularity != "full":
        keys.append("model.activations_checkpoint_granularity=full")
        yield job.laid_out(activations_checkpoint_granularity="full"), keys[0]
    if not job.model.activation_offload:
        keys.append("model.activation_offload=true")
        yield job.laid_out(activations_checkpoint_granularity="full", activation_offload=True), " and ".join(keys)


def _share_keys(share: float) -> str:
    key = "model.optim.optimizer_cpu_offload=true"
    return key if share == 1 else f"{key} and model.optim.optimizer_offload_fraction={share}"


def _with_reference(job: Job, kept: Sequence[tuple[MomentStorage, str]]) -> Iterator[tuple[Job, str]]:
    """Each with the reference policy where it is, and on the host."""
    moves = job.reference_copy and not job.reference_on_host
    for moments, keys in kept:
        if keys:
            yield dataclasses.replace(job, moments=moments), keys
        if moves:
            moved = dataclasses.replace(job, moments=moments, reference_on_host=True)
            yield moved, " and ".join(filter(None, ("trainer.grpo.offload_reference_policy=true", keys)))


def estimate(job: Job, hardware: str | Hardware = "H100", assumptions: Assumptions | None = None) -> Estimate:
    """Estimate a job on one kind of GPU.

    Args:
        job: see `Job`; recipes make it of their configuration.
        hardware: a name of `HARDWARE`, or your own.
        assumptions: what no data sheet says.

    Raises:
        UserError: hardware that is not known; ranks or batches that do not divide (when the job is made).
    """
    hardware = find_hardware(hardware) if isinstance(hardware, str) else hardware
    assumptions = assumptions or Assumptions()
    stages = tuple(stage_memory(job, stage) for stage in range(job.model.pipeline_model_parallel_size))
    return Estimate(job, hardware, assumptions, stages, step_time(job, hardware, assumptions))


@dataclass(frozen=True)
class Grouping:
    """What encoding a prompt once for all its responses is worth.

    Attributes:
        tokens, repeated_tokens: that go through the layers in one step's training.
        flops, repeated_flops: of a step's scoring and training.
        seconds, repeated_seconds: of a step.
        pays: whether a step without its sampling, which shares prompts in any case, gets faster by the least that counts.
    """

    tokens: int
    repeated_tokens: int
    flops: float
    repeated_flops: float
    seconds: float
    repeated_seconds: float
    pays: bool


def grouping_gain(estimated: Estimate) -> Grouping:
    """Compare an estimate with that of the same job, its prompts shared and repeated."""
    shared, repeated = (
        step_time(dataclasses.replace(estimated.job, share_prefix=share), estimated.hardware, estimated.assumptions)
        for share in (True, False)
    )
    pays = repeated.total - repeated.sampling >= LEAST_SPEEDUP * (shared.total - shared.sampling)
    return Grouping(shared.tokens, repeated.tokens, shared.flops, repeated.flops, shared.total, repeated.total, pays)
