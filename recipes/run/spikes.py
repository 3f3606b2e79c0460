"""Numbers of a step that are far from those of the steps before it."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence

__all__ = ["Spikes"]

WINDOW = 50  # steps that a step is compared with
LEAST = 20  # steps before the first comparison
TO_SIGMA = 1.4826  # of the median distance from the median, for a normal distribution
SMALLEST = 1e-3  # spread that counts, of the median: where numbers hardly move a hair is no spike


class Spikes:
    """
    Args:
        names: of the metrics that are looked at.
        factor: how many deviations from the median are a spike; None: none is looked for.
    """

    def __init__(self, names: Sequence[str], factor: float | None):
        self._names, self._factor = names, factor
        self._past: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def look(self, metrics: dict[str, float]) -> list[str]:
        """What is far away, in words; then the step is one of those before."""
        found = []
        for name in self._names if self._factor is not None else ():
            if (value := metrics.get(name)) is None:
                continue
            past = self._past[name]
            if len(past) >= LEAST:
                middle = statistics.median(past)
                spread = TO_SIGMA * statistics.median(abs(x - middle) for x in past)
                if abs(value - middle) > self._factor * max(spread, SMALLEST * abs(middle)):
                    found.append(f"{name} is {value:.4g}, the median of the {len(past)} steps before {middle:.4g}")
            past.append(value)
        return found
