"""The fastest layout of what fits: every tensor, pipeline and context size, with and without recomputation."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.errors import UserError
from megatron_ext.planner.estimates import Estimate, estimate
from megatron_ext.planner.hardware import Assumptions, Hardware
from megatron_ext.planner.job import Job

__all__ = ["best_layouts", "layouts"]

SPLIT = (
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "virtual_pipeline_model_parallel_size",
)  # fmt: skip


def layouts(job: Job, largest_context: int = 8) -> Iterator[Job]:
    """The job in every layout that the model's rules and the batch allow; a tensor-parallel group stays in its node."""
    for tensor in _divisors(job.devices):
        for pipeline in sorted({*_divisors(job.model.num_layers), job.model.pipeline_model_parallel_size}):
            # The job's own numbers of layers are for as many stages as it has.
            same = pipeline == job.model.pipeline_model_parallel_size
            split = {} if same else dict.fromkeys(SPLIT)
            for context in _powers(largest_context):
                for granularity in (None, "full"):
                    changes = {
                        "tensor_model_parallel_size": tensor,
                        "pipeline_model_parallel_size": pipeline,
                        "context_parallel_size": context,
                        "sequence_parallel": tensor > 1,
                        "activations_checkpoint_granularity": granularity,
                        **split,
                    }
                    if job.world % (tensor * pipeline * context) or (job.block and granularity):
                        continue
                    try:
                        yield job.laid_out(**changes)
                    except UserError:  # heads or batches that do not divide
                        continue


def best_layouts(
    job: Job, hardware: str | Hardware = "H100", assumptions: Assumptions | None = None, count: int = 5
) -> list[Estimate]:
    """The fastest layouts that fit, best first; none where nothing fits."""
    found = (estimate(candidate, hardware, assumptions) for candidate in layouts(job))
    return sorted((e for e in found if e.fits), key=lambda e: e.step.total)[:count]


def _divisors(number: int) -> Iterator[int]:
    return (d for d in range(1, number + 1) if number % d == 0)


def _powers(limit: int) -> Iterator[int]:
    value = 1
    while value <= limit:
        yield value
        value *= 2
