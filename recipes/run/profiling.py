"""What the steps of a window spend their time and memory on, by torch's own profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.errors import UserError
from recipes.cli.config import at_least

__all__ = ["ProfileSection", "profiled"]

FOLDER = "profile"
ROWS = 40  # of the table
EVENTS = 1_000_000  # allocations that a snapshot holds


@dataclass
class ProfileSection:
    # The first step that is profiled; earlier ones warm up.
    start_step: int = 3
    # Steps of the window. A trace of a step is tens of MB.
    steps: int = 1
    # Ranks that write profile/ of the run's folder.
    ranks: list[int] = field(default_factory=lambda: [0])
    # Shapes of operations in the trace.
    shapes: bool = False
    # On GPUs: every allocation of the window too, for pytorch.org/memory_viz.
    memory: bool = False

    def __post_init__(self):
        at_least("trainer.profile", self, 1, "start_step", "steps")

    def check(self, ranks: int) -> None:
        """
        Raises:
            UserError: what cannot be recorded by so many ranks, here.
        """
        if beyond := [rank for rank in self.ranks if not 0 <= rank < ranks]:
            raise UserError(f"trainer.profile.ranks names {beyond[0]}, and the run has ranks 0 to {ranks - 1}")
        if self.memory and not torch.cuda.is_available():
            raise UserError(
                "trainer.profile.memory=true records what a GPU allocates, and there is none: set it to false"
            )

    @property
    def last(self) -> int:
        return self.start_step + self.steps - 1


@contextlib.contextmanager
def profiled(
    section: ProfileSection | None, folder: Path, steps: range, say: Callable[[str], None]
) -> Iterator[Callable[[int], None]]:
    """Gives what is to be told before each step; the window is written when it has passed, or the run ends in it.

    Args:
        folder: of the run.
        steps: that the run takes now.
    """
    if section is not None and section.start_step not in steps:
        say(f"nothing is profiled: trainer.profile.start_step={section.start_step} is none of the steps to be taken")
    wanted = section is not None and dist.get_rank() in section.ranks
    with contextlib.ExitStack() as window:

        def before(step: int) -> None:
            if wanted and step == section.start_step:
                window.enter_context(_recording(section, folder, say))
            elif wanted and step == section.last + 1:
                window.close()

        yield before


@contextlib.contextmanager
def _recording(section: ProfileSection, folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    if section.memory:
        torch.cuda.memory._record_memory_history(max_entries=EVENTS)
    profiler = torch.profiler.profile(activities=activities, record_shapes=section.shapes)
    with profiler:
        yield
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    name = f"step-{section.start_step}-to-{section.last}-rank-{dist.get_rank()}"
    profiler.export_chrome_trace(str(place / f"{name}.json.gz"))
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=ROWS)
    (place / f"{name}.txt").write_text(table, encoding="utf-8")
    if section.memory:
        torch.cuda.memory._dump_snapshot(str(place / f"{name}-memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    say(f"steps {section.start_step} to {section.last} are profiled in {place}: open {name}.json.gz in ui.perfetto.dev")
