"""Does it fit, and how long does it take: one call for tools and launchers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_ext.flops import LEAST_SPEEDUP
from megatron_ext.planner.hardware import GIB, Assumptions, Hardware, find_hardware
from megatron_ext.planner.job import Job
from megatron_ext.planner.memory import StageMemory, stage_memory
from megatron_ext.planner.time import StepTime, step_time

__all__ = ["Estimate", "Grouping", "estimate", "grouping_gain"]

# Of a `Job`, what puts it into the host's memory.
OFFLOADING = {
    "reference_on_host": "trainer.grpo.offload_reference_policy=true",
    "optimizer_on_host": "model.optim.optimizer_cpu_offload=true",
}


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
        helps = self._offloading_that_helps()
        return (
            f"does not fit: {numbers}; {parts[most] / GIB:.1f} GiB of it are {most}; use more nodes or another layout"
            + (f", or {helps}, with which it fits" if helps else "")
        )

    def _offloading_that_helps(self) -> str | None:
        """What to put into the host's memory for the job to fit, no more than is needed; None: nothing helps."""
        job, room = self.job, self.hardware.memory - self.assumptions.reserve
        reference = job.reference_copy and not job.reference_on_host
        optimizer = not job.optimizer_on_host
        choices = [["reference_on_host"]] * reference + [["optimizer_on_host"]] * optimizer
        choices += [["reference_on_host", "optimizer_on_host"]] * (reference and optimizer)
        for choice in choices:
            moved = dataclasses.replace(job, **dict.fromkeys(choice, True))
            if all(stage_memory(moved, stage.stage).total <= room for stage in self.stages):
                return " and ".join(OFFLOADING[name] for name in choice)
        return None


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
