"""What a run needs before it is started: memory to the byte where Megatron allocates it, time as an estimate."""

from megatron_ext.planner.estimates import Estimate, Grouping, estimate, grouping_gain
from megatron_ext.planner.growth import Growth, grow
from megatron_ext.planner.hardware import HARDWARE, Assumptions, Hardware
from megatron_ext.planner.job import Job
from megatron_ext.planner.search import best_layouts, layouts

__all__ = [
    "HARDWARE",
    "Assumptions",
    "Grouping",
    "Growth",
    "Hardware",
    "Job",
    "Estimate",
    "best_layouts",
    "grouping_gain",
    "grow",
    "layouts",
    "estimate",
]
