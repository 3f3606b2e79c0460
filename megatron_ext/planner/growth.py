"""The same job on more and more nodes: time of a step, and how much of the added machines is used.

Two ways to grow. Weak: every data-parallel rank keeps its share, so the batch grows with the ranks. Strong: the batch
stays, so every rank's share shrinks, as far as it divides.

Beside what `time` estimates, two things grow with the machines. All data-parallel ranks wait for the last: of r ranks whose
work varies by a relative standard deviation s, it needs about s sqrt(2 ln r) more than the mean (of normal variables). And
some GPU fails: then a restart and the steps since the last checkpoint are lost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.errors import UserError
from megatron_ext.planner.estimates import Estimate, estimate
from megatron_ext.planner.job import Job

__all__ = ["Growth", "expected_seconds", "grow"]

HOUR = 3600.0


@dataclass(frozen=True)
class Growth:
    """One number of GPUs.

    Attributes:
        data_parallel: ranks.
        weak_seconds: of a step with a batch that grows with the ranks, waiting and failures included.
        weak_efficiency: tokens per GPU and second, as a share of the first size's.
        strong_seconds, strong_efficiency: with the same batch; None where it does not divide.
    """

    gpus: int
    data_parallel: int
    weak_seconds: float
    weak_efficiency: float
    strong_seconds: float | None
    strong_efficiency: float | None


def grow(start: Estimate, nodes: Sequence[int]) -> list[Growth]:
    """`start`'s job on each number of nodes, its layout unchanged.

    Raises:
        UserError: a number of nodes whose ranks do not divide by the layout.
    """
    job, base = start.job, _rate(start)
    found = []
    for count in nodes:
        ranks = job.sizes.data(count * job.devices)
        weak = _estimated(start, dataclasses.replace(job, nodes=count, groups=job.local_groups * ranks))
        try:
            strong = _estimated(start, job.on(count))
        except UserError:  # fewer groups than ranks
            strong = None
        found.append(
            Growth(
                count * job.devices,
                ranks,
                expected_seconds(weak),
                _rate(weak) / base,
                None if strong is None else expected_seconds(strong),
                None if strong is None else _rate(strong) / base,
            )
        )
    return found


def _estimated(start: Estimate, job: Job) -> Estimate:
    return estimate(job, start.hardware, start.assumptions)


def expected_seconds(estimated: Estimate) -> float:
    """Of a step, with waiting for the last rank and the share that failures take."""
    assumed = estimated.assumptions
    waiting = 1 + assumed.spread * math.sqrt(2 * math.log(estimated.job.data_parallel))
    seconds = estimated.step.total * waiting
    lost = assumed.restart + assumed.steps_between_checkpoints * seconds / 2
    failures_per_second = estimated.job.world / (assumed.hours_between_failures * HOUR)
    return seconds * (1 + failures_per_second * lost)


def _rate(estimated: Estimate) -> float:
    """Tokens per GPU and second."""
    return estimated.step.tokens / expected_seconds(estimated) / estimated.job.world
