"""Tables over runs: what their numbers were at the end, and where their configurations differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.run.metrics import in_order
from tools.reporting.numbers import drawable
from tools.reporting.runs import Run

__all__ = ["Ends", "Missing", "configuration", "differences", "ends", "environments"]


@dataclass(frozen=True)
class Ends:
    """One metric of one run: (step, value) of its first, last, lowest and highest number."""

    first: tuple[int, float]
    last: tuple[int, float]
    lowest: tuple[int, float]
    highest: tuple[int, float]

    @classmethod
    def of(cls, series: dict[int, float]) -> Ends | None:
        points = list(series.items())
        finite = [point for point in points if drawable(point[1])] or points
        if not points:
            return None
        return cls(points[0], points[-1], min(finite, key=_value), max(finite, key=_value))


def _value(point: tuple[int, float]) -> float:
    return point[1]


def ends(runs: Sequence[Run]) -> list[tuple[str, list[Ends | None]]]:
    """By metric, of each run; in the order of docs/metrics.md."""
    names = in_order(name for run in runs for row in run.rows for name in row if name != "step")
    return [(name, [Ends.of(run.series(name)) for run in runs]) for name in names]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Keys of which not all runs have the same value, with that of each; MISSING where one has no such key."""
    return [(key, values) for key, values in configuration(runs) if any(value != values[0] for value in values[1:])]


def environments(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """What is known of where each run ran."""
    names = dict.fromkeys(name for run in runs for name in run.environment)
    return [(name, [run.environment.get(name, MISSING) for run in runs]) for name in names]


class Missing:
    """What a run has under a key that it does not have."""

    def __str__(self) -> str:
        return "–"


MISSING = Missing()


def configuration(runs: Sequence[Run]) -> Iterator[tuple[str, list[Any]]]:
    """Every key with the value that each run has."""
    for key in dict.fromkeys(key for run in runs for key in run.config):
        yield key, [run.config.get(key, MISSING) for run in runs]
