"""How rewards, lengths and mismatches of responses are distributed over steps: a column for each step, a row for each bin."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tools.reporting.dumps import DumpedStep, Dumps, Spread
from tools.reporting.numbers import BROAD, every_so_many, short

__all__ = ["Bins", "Column", "HeatMap", "heat_maps"]

BINS = 16
MARKS, LEVELS = 8, 9  # that are written below and beside a map


@dataclass(frozen=True)
class Bins:
    """
    Attributes:
        edges: the lowest value of each bin; a value belongs to the last one whose edge it reaches.
        names: of the bins.
        within: where in a bin its edge is, from 0, its lower side, to 1; None: no line of means is drawn.
    """

    edges: list[float]
    names: list[str]
    within: float | None = 0.0

    def place(self, value: float) -> float:
        """In bins from the lowest side, on a straight line between edges."""
        if len(self.edges) == 1:
            return 0.5
        i = min(max(bisect_right(self.edges, value) - 1, 0), len(self.edges) - 2)
        low, high = self.edges[i : i + 2]
        return min(i + self.within + (value - low) / (high - low or 1.0), float(len(self.edges)))

    def count(self, spread: Spread | None) -> list[int]:
        found = [0] * len(self.edges)
        for value, number in spread.counts.items() if spread else ():
            found[max(bisect_right(self.edges, value) - 1, 0)] += number
        return found


@dataclass(frozen=True)
class Column:
    """
    Attributes:
        counts: values in each bin, from the lowest.
        cells: (place of the top, share of the values) of those that are not empty.
    """

    step: int
    counts: list[int]
    mean: float | None
    cells: list[tuple[float, float]]
    left: float


@dataclass(frozen=True)
class HeatMap:
    """
    Attributes:
        run: its number.
        marks, levels: (place, text) to write below and beside it.
        means: (x, y) of a line through the steps' means.
    """

    run: int
    title: str
    about: str
    bins: Bins
    columns: list[Column]
    width: float
    height: float
    marks: list[tuple[float, int]]
    levels: list[tuple[float, str]]
    means: list[tuple[float, float]]


@dataclass(frozen=True)
class Kind:
    title: str
    about: str
    spread: Callable[[DumpedStep], Spread | None]
    bins: Callable[[Sequence[float]], Bins]


def heat_maps(dumps: Sequence[Dumps]) -> list[list[HeatMap]]:
    """For each kind of number the maps of all runs, with the same bins."""
    found = []
    for kind in KINDS:
        spreads = [spread for dump in dumps for step in dump.steps if (spread := kind.spread(step))]
        values = sorted(set().union(*(spread.counts for spread in spreads)))
        if values:
            bins = kind.bins(values)
            found.append([_map(dump, kind, bins) for dump in dumps if any(map(kind.spread, dump.steps))])
    return found


def _map(dump: Dumps, kind: Kind, bins: Bins) -> HeatMap:
    width, height = BROAD.across_all / len(dump.steps), BROAD.down_all / len(bins.edges)
    columns = []
    for i, step in enumerate(dump.steps):
        spread = kind.spread(step)
        counts = bins.count(spread)
        cells = [
            (round(BROAD.down(0) - (row + 1) * height, 2), round(count / sum(counts), 3))
            for row, count in enumerate(counts)
            if count
        ]
        columns.append(Column(step.step, counts, spread and spread.mean, cells, round(BROAD.left + i * width, 2)))
    marks = [(round(column.left + width / 2, 1), column.step) for column in every_so_many(columns, MARKS)]
    rows = every_so_many(range(len(bins.edges)), LEVELS)
    levels = [(round(BROAD.down(0) - (row + 0.5) * height, 1), bins.names[row]) for row in rows]
    means = [
        (round(column.left + width / 2, 1), round(BROAD.down(0) - bins.place(column.mean) * height, 1))
        for column in columns
        if column.mean is not None and bins.within is not None
    ]
    return HeatMap(
        dump.run, kind.title, kind.about, bins, columns, round(width, 2), round(height, 2), marks, levels, means
    )


def _value_bins(values: Sequence[float]) -> Bins:
    """One for each value, where there are few; else of equal width."""
    if len(values) <= BINS:
        return Bins(list(values), [short(x) for x in values], within=0.5)
    low, high = values[0], values[-1]
    edges = [low + i * (high - low) / BINS for i in range(BINS)]
    return Bins(edges, [f"{short(a)} to {short(b)}" for a, b in zip(edges, [*edges[1:], high], strict=True)])


def _length_bins(values: Sequence[float]) -> Bins:
    """Of equal numbers of tokens, from 1."""
    size = math.ceil(values[-1] / BINS) or 1
    edges = [float(x) for x in range(1, int(values[-1]) + 1, size)] or [0.0]
    names = [f"{x:.0f}" if size == 1 else f"{x:.0f} to {x + size - 1:.0f}" for x in edges]
    return Bins(edges, names, within=0.5 / size)


def _decade_bins(values: Sequence[float]) -> Bins:
    """One for each power of ten; the first has what is below, too."""
    powers = [round(math.log10(x)) for x in values if x] or [-8]
    first, last = max(powers[0], powers[-1] - BINS + 1), powers[-1]
    names = [f"below 1e{first + 1}", *(f"from 1e{e}" for e in range(first + 1, last + 1))]
    return Bins([10.0**e for e in range(first, last + 1)], names, within=None)


KINDS = (
    Kind("reward", "Rewards of the responses of a step.", lambda step: step.rewards, _value_bins),
    Kind(
        "response length",
        "Tokens of the responses of a step, what they observed included.",
        lambda step: step.lengths,
        _length_bins,
    ),
    Kind(
        "mismatch of tokens",
        "|trainer - sampler| log-probability of the tokens of a step, in nats, by powers of ten.",
        lambda step: step.apart,
        _decade_bins,
    ),
)
