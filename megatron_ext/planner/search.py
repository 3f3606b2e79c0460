"""The fastest layout of what fits: every tensor, pipeline, context and expert size, with and without recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

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
                for experts, granularity in product(_expert_sizes(job, tensor, pipeline), (None, "full")):
                    changes = {
                        **experts,
                        "tensor_model_parallel_size": tensor,
                        "pipeline_model_parallel_size": pipeline,
                        "context_parallel_size": context,
                        "sequence_parallel": tensor > 1,
                        "activations_checkpoint_granularity": granularity,
                        **split,
                    }
                    if job.world % (tensor * pipeline * context) or (job.blocks and granularity):
                        continue
                    try:
                        yield job.laid_out(**changes)
                    except UserError:  # heads or batches that do not divide
                        continue


def _expert_sizes(job: Job, tensor: int, pipeline: int) -> list[dict[str, int | None]]:
    """Sizes of expert parallelism to try: whole experts, over as many ranks as there are."""
    found: list[dict[str, int | None]] = [{"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None}]
    if job.model.num_moe_experts is not None:
        largest = min(job.model.num_moe_experts, job.world // pipeline)
        found += [
            {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1}
            for size in _powers(largest)
            if size > 1 and job.world % (size * pipeline) == 0
        ]
    return found


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
