"""Where the seconds of a run's steps went, step by step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from recipes.run.metrics import REST, WHOLE, seconds_of
from tools.reporting.numbers import BROAD, Axis, axis, every_so_many
from tools.reporting.runs import Run

__all__ = ["Bar", "PhaseChart", "phase_charts"]

BARS = 80
MARKS = 8  # steps that are written below


@dataclass(frozen=True)
class Bar:
    """Steps from `first` to `last`, on average.

    Attributes:
        seconds: by phase.
        blocks: (number of the phase, top, height) of each.
        left, width: its place.
    """

    first: int
    last: int
    seconds: dict[str, float]
    whole: float
    blocks: list[tuple[int, float, float]]
    left: float
    width: float

    @property
    def steps(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


@dataclass(frozen=True)
class PhaseChart:
    """
    Attributes:
        run: its number.
        phases: names, that of the largest share first and the rest last; the same in the charts of all runs.
        means: seconds of each that the run has, over all steps, and its share.
        marks: (place, step) to write below.
    """

    run: int
    phases: list[str]
    y: Axis
    bars: list[Bar]
    means: list[tuple[str, float, float]]
    marks: list[tuple[float, int]]
    each: int


def phase_charts(runs: Sequence[Run]) -> list[PhaseChart]:
    """Of the runs that have timers, on one scale."""
    found = {}
    for i, run in enumerate(runs):
        steps = {row["step"]: seconds for row in run.rows if (seconds := seconds_of(row)) and _trained(row)}
        if steps:
            found[i] = steps
    names = dict.fromkeys(name for steps in found.values() for seconds in steps.values() for name in seconds)
    total = {name: sum(s.get(name, 0.0) for steps in found.values() for s in steps.values()) for name in names}
    phases = sorted(names, key=lambda name: (name == REST, -total[name]))
    stretches = {i: _stretches(steps) for i, steps in found.items()}
    highest = [sum(max(x, 0.0) for x in seconds.values()) for part in stretches.values() for *_, seconds in part]
    y = axis(highest, floor=0.0)
    return [_chart(i, found[i], stretches[i], phases, y) for i in found]


def _trained(row: dict[str, float]) -> bool:
    """Whether a step was taken, and not a validation alone."""
    return WHOLE in row or any(name.startswith("train_") for name in row)


def _stretches(steps: dict[int, dict[str, float]]) -> list[tuple[int, int, dict[str, float]]]:
    """(first step, last step, mean seconds by phase), at most BARS of them."""
    order, found = sorted(steps), []
    size = math.ceil(len(order) / BARS)
    for begin in range(0, len(order), size):
        part = order[begin : begin + size]
        names = dict.fromkeys(name for step in part for name in steps[step])
        means = {name: statistics.fmean(steps[step].get(name, 0.0) for step in part) for name in names}
        found.append((part[0], part[-1], means))
    return found


def _chart(
    run: int,
    steps: dict[int, dict[str, float]],
    stretches: Sequence[tuple[int, int, dict[str, float]]],
    phases: list[str],
    y: Axis,
) -> PhaseChart:
    slot = BROAD.across_all / len(stretches)
    bars = []
    for i, (first, last, seconds) in enumerate(stretches):
        width = min(slot * 0.86, 40.0)
        left = BROAD.left + (i + 0.5) * slot - width / 2
        blocks = _blocks(phases, seconds, y)
        bars.append(Bar(first, last, seconds, sum(seconds.values()), blocks, round(left, 2), round(width, 2)))
    there = [name for name in phases if any(name in s for s in steps.values())]
    mean = {name: statistics.fmean(s.get(name, 0.0) for s in steps.values()) for name in there}
    whole = sum(mean.values()) or 1.0
    means = [(name, seconds, seconds / whole) for name, seconds in mean.items()]
    marks = [(round(bar.left + bar.width / 2, 1), bar.first) for bar in every_so_many(bars, MARKS)]
    return PhaseChart(run, phases, y, bars, means, marks, math.ceil(len(steps) / BARS))


def _blocks(phases: Sequence[str], seconds: dict[str, float], y: Axis) -> list[tuple[int, float, float]]:
    """From the bottom up; what would be negative, as of a clock that was set back, has none."""
    blocks, below = [], 0.0
    for number, name in enumerate(phases):
        value = seconds.get(name, 0.0)
        if value > 0:
            top, bottom = (BROAD.down(y.place(x)) for x in (below + value, below))
            blocks.append((number, round(top, 2), round(bottom - top, 2)))
            below += value
    return blocks
