"""Curves: which metrics are drawn together, their points, and where these lie on the chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recipes.run.metrics import METRICS, Metric, in_order, key_of
from tools.reporting.numbers import NARROW, Axis, axis, drawable, key_steps
from tools.reporting.runs import Run

__all__ = ["Curve", "CurveChart", "Section", "curve_sections"]

POINTS = 240  # steps of a chart that are drawn and told
# Held-out values are drawn where those of training are.
WITH = {"val_rollouts/": "train_rollouts/", "val/loss": "train_optim/loss",
        "train_optim/tokens_repeated": "train_optim/tokens_executed",
        "train_rollouts/staleness_max": "train_rollouts/staleness"}  # fmt: skip
# The first part of a metric's name, and what stands above its charts.
TITLES = {"train_rollouts": "Rollouts", "val_rollouts": "Held out", "val": "Held out", "train_optim": "Optimisation"}
NOT_DRAWN = "timers/"  # they have a chart of their own


@dataclass(frozen=True)
class Curve:
    """One metric of one run.

    Attributes:
        run: its number.
        metric: name.
        companion: whether it is drawn beside the chart's own metric.
        values: by step, of those that are shown.
        paths: lines of (x, y) between gaps.
        points: (x, y) of each value.
    """

    run: int
    metric: str
    companion: bool
    values: dict[int, float]
    paths: list[list[tuple[float, float]]]
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class CurveChart:
    """
    Attributes:
        metrics: the one that it is about, and perhaps a companion.
        total: steps that have a value; `steps` are those shown.
        strays: values that are no number.
    """

    metrics: list[str]
    about: Metric | None
    x: Axis
    y: Axis
    curves: list[Curve]
    steps: list[int]
    total: int
    strays: int

    @property
    def title(self) -> str:
        return self.metrics[0].partition("/")[2] or self.metrics[0]


@dataclass(frozen=True)
class Section:
    """
    Attributes:
        constant: name and value of what is the same at every step of every run, and so is not drawn.
    """

    title: str
    charts: list[CurveChart]
    constant: list[tuple[str, float]]


def curve_sections(runs: Sequence[Run]) -> list[Section]:
    found: dict[str, Section] = {}
    for metrics in _drawn_together(runs):
        title = TITLES.get(metrics[0].partition("/")[0], "Other")
        section = found.setdefault(title, Section(title, [], []))
        values = {x for run in runs for name in metrics for x in run.series(name).values()}
        if len(values) == 1 and len(metrics) == 1 and max(len(run.series(metrics[0])) for run in runs) > 1:
            section.constant.append((metrics[0], *values))
        else:
            section.charts.append(_chart(runs, metrics))
    return sorted(found.values(), key=lambda section: [*dict.fromkeys(TITLES.values()), "Other"].index(section.title))


def _drawn_together(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Names of what the runs have logged, in the order of docs/metrics.md and then others."""
    names = in_order(name for run in runs for row in run.rows for name in row if name != "step")
    leaders = {name: lead for name in names if (lead := _leader(name)) in names}
    for name in names:
        if not name.startswith(NOT_DRAWN) and name not in leaders:
            yield [name, *(other for other in names if leaders.get(other) == name)]


def _leader(name: str) -> str | None:
    """The metric that this one would be drawn with."""
    return next((lead + name.removeprefix(begin) for begin, lead in WITH.items() if name.startswith(begin)), None)


def _chart(runs: Sequence[Run], metrics: list[str]) -> CurveChart:
    about = METRICS.get(key_of(metrics[0]))
    whole = {(i, name): values for i, run in enumerate(runs) for name in metrics if (values := run.series(name))}
    steps = key_steps(list(whole.values()), POINTS)
    x = _steps_axis(steps)
    y = axis((value for values in whole.values() for value in values.values()), may_be_log=True)
    curves = []
    for (run, name), values in whole.items():
        shown = {step: values[step] for step in steps if step in values}
        places = [(round(NARROW.across(x.place(step)), 1), _height(y, value)) for step, value in shown.items()]
        finite = [(a, b) for a, b in places if b is not None]
        curves.append(Curve(run, name, name != metrics[0], shown, list(_lines(places)), finite))
    strays = sum(not drawable(value) for values in whole.values() for value in values.values())
    return CurveChart(metrics, about, x, y, curves, steps, len(set().union(*whole.values())), strays)


def _steps_axis(steps: Sequence[int]) -> Axis:
    found = axis(steps)
    low, high = (steps[0], steps[-1]) if steps[0] < steps[-1] else (steps[0] - 1, steps[0] + 1)
    return Axis(low, high, [tick for tick in found.ticks if tick == int(tick) and low <= tick <= high], found.step)


def _height(y: Axis, value: float) -> float | None:
    """From the top; None: no number, which has no place."""
    return round(NARROW.down(y.place(value)), 1) if drawable(value) else None


def _lines(places: Sequence[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    line: list[tuple[float, float]] = []
    for x, y in (*places, (0.0, None)):
        if y is not None:
            line.append((x, y))
        elif line:
            yield line
            line = []
