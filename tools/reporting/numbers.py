"""Numbers to be read: how they are written, the ticks of an axis, and which of many are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "BROAD",
    "NARROW",
    "Axis",
    "Box",
    "axis",
    "drawable",
    "every_so_many",
    "key_steps",
    "short",
    "spread_out",
    "written",
]

DECADES = 3  # an axis is logarithmic where positive values go over more
TICKS = 4
ROOM = 0.06  # of an axis above and below the values
ROUNDING, LEAST, MOST = 1e-5, 1e-300, 1e300  # values that differ by less of themselves, or at all, are not told apart


def written(value: float) -> str:
    """For a table: five digits, or all of a whole number."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e5 or float(value).is_integer():
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.4e}"
    return f"{value:.5g}"


def short(value: float) -> str:
    """For a tick."""
    if value == 0:
        return "0"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if letter == "k" else 1):
            return f"{value / size:.4g}{letter}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Box:
    """A chart in units of its own, which the browser scales, and how far what is drawn keeps from its sides."""

    width: int
    height: int
    left: int = 44
    right: int = 8
    top: int = 10
    bottom: int = 22

    @property
    def across_all(self) -> int:
        return self.width - self.left - self.right

    @property
    def down_all(self) -> int:
        return self.height - self.top - self.bottom

    def across(self, share: float) -> float:
        return self.left + share * self.across_all

    def down(self, share: float) -> float:
        """
        Args:
            share: 0 is the lowest.
        """
        return self.top + (1 - share) * self.down_all


NARROW, BROAD = Box(360, 200), Box(560, 210, left=72)


@dataclass(frozen=True)
class Axis:
    """
    Attributes:
        low, high: ends, in values.
        ticks: values that are written beside it.
        step: between ticks; 0: they are powers of ten.
    """

    low: float
    high: float
    ticks: list[float]
    step: float = 0.0

    @property
    def log(self) -> bool:
        return self.step == 0

    def label(self, tick: float) -> str:
        """With as many digits as tell it from the next one."""
        digits = 0 if self.log else max(0, -math.floor(math.log10(self.step) + 1e-9))
        return f"{tick:.{digits}f}" if 3 < digits < 8 and max(abs(self.low), abs(self.high)) > 0.1 else short(tick)

    def place(self, value: float) -> float:
        """From 0, the low end, to 1."""
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)


def drawable(value: float) -> bool:
    """Whether it has a place on an axis: no number has none, and neither has what is as large as no metric gets."""
    return abs(value) < MOST


def axis(values: Iterable[float], floor: float | None = None, may_be_log: bool = False) -> Axis:
    """
    Args:
        values: what must be on it, if it is drawable.
        floor: a value that is on it, too, and that it does not go beyond where no value does.
        may_be_log: whether it is logarithmic where all values are positive and far apart.
    """
    found = [x for x in values if drawable(x)] or [0.0, 1.0]
    low, high = min(found), max(found)
    if may_be_log and low > LEAST and high / low > 10**DECADES:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, math.ceil((last - first) / TICKS))
        return Axis(10.0**first, 10.0**last, [10.0**e for e in range(first, last + 1, every)])
    if floor is not None:
        low, high = min(low, floor), max(high, floor)
    if high - low <= max(ROUNDING * max(abs(low), abs(high)), LEAST):
        low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    room = ROOM * (high - low)
    low, high = low - room * (low != floor), high + room * (high != floor)
    step = _step((high - low) / TICKS)
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, ticks, step)


def _step(wanted: float) -> float:
    """The nearest of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / wanted)))


def key_steps(series: Sequence[Mapping[int, float]], limit: int) -> list[int]:
    """Which steps of curves to show where there are more than `limit`: of each stretch of steps those where a curve is lowest,
    highest or no number; the first and the last. So no peak is lost, and every point is one that was logged."""
    steps = sorted(set().union(*series))
    if len(steps) <= limit:
        return steps
    size = math.ceil(len(steps) / max(1, (limit - 2) // (3 * len(series))))
    kept = {steps[0], steps[-1]}
    for begin in range(0, len(steps), size):
        for values in series:
            there = [step for step in steps[begin : begin + size] if step in values]
            finite = [step for step in there if drawable(values[step])]
            others = [step for step in there if not drawable(values[step])]
            kept.update(others[:1])
            if finite:
                kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)


def every_so_many(items: Sequence, limit: int) -> list:
    """At most so many, at equal distances from the first on."""
    return list(items[:: math.ceil(len(items) / limit)])


def spread_out(items: Sequence, limit: int) -> list:
    """At most so many, evenly from the first to the last."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)] if limit > 1 else [items[-1]]
