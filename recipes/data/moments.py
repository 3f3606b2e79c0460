"""When the pictures of a film are shown, and which of them stand in the middle of equal stretches of it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

__all__ = [
    "ROUNDING", "Clock", "FrameTimes", "Picture", "are_even", "edges_of", "on_screen", "sample_frames", "standing",
    "times_of_frames",
]  # fmt: skip

ROUNDING = 1.5  # ticks by which a timestamp may lie beside where its picture comes
MICROSECONDS = 6  # decimals of a row's seconds: the most that count
MILLISECONDS = 3  # the fewest that say how they were rounded
WHOLE = 1e-3  # of a unit: what floats leave of a number that was written with so many decimals


@dataclass(frozen=True)
class Picture:
    """When a picture is shown, in ticks of its stream: what its packet said (None: nothing) and for how long (0: unknown)."""

    pts: int | None
    dts: int | None
    duration: int


@dataclass(frozen=True)
class Clock:
    """How to read the timestamps of a stream.

    Attributes:
        frame: ticks of a frame at the stream's rate.
        longest: ticks; a picture is shown no longer.
        has_pts: AVI stores when a picture is decoded, not when it is shown; FFmpeg's guess is late where some were dropped.
    """

    frame: Fraction
    longest: Fraction
    has_pts: bool


@dataclass(frozen=True)
class FrameTimes:
    """
    Attributes:
        edges: when each frame comes, from the first, and at last when the last goes; in units.
        seconds: from the first frame to the end of the last.
        short: by how many seconds that may be too little, because times are rounded.
    """

    edges: Sequence[Fraction | int]
    seconds: float
    short: float


def sample_frames(total: int, count: int) -> list[int]:
    """Numbers of `count` frames out of `total`, from the middle of equal stretches."""
    return [int((i + 0.5) * total / count) for i in range(count)]


def on_screen(pictures: Sequence[Picture], clock: Clock, count: int) -> list[int]:
    """Numbers of the pictures on the screen in the middle of `count` equal stretches."""
    return standing(edges_of(pictures, clock), count)


def standing(edges: Sequence[Fraction | int], count: int) -> list[int]:
    """As `on_screen`, by when each picture comes and at last when the last goes.

    Pictures at equal distances are counted instead, lest the rounding of timestamps (to milliseconds in Matroska) decide
    which of two is shown when a moment falls on the change from one to the other.
    """
    if are_even(edges):
        return sample_frames(len(edges) - 1, count)
    return [bisect_right(edges, Fraction(2 * i + 1, 2 * count) * edges[-1]) - 1 for i in range(count)]


def are_even(edges: Sequence[Fraction | int]) -> bool:
    """Whether pictures come at equal distances, but for the rounding of ticks."""
    total = len(edges) - 1
    step = float(edges[-1]) / total if total else 0.0
    slack = min(ROUNDING, step / 4)
    return all(abs(edge - number * step) <= slack for number, edge in enumerate(edges))


def times_of_frames(times: Sequence[float]) -> FrameTimes:
    """Of frames at these seconds; the last stays as long as they do on average, one alone for a second.

    Seconds have been rounded when they were written: 0.3, 0.7, 1.0 are three frames a second with one decimal. Their unit is the
    finest in which frames come at equal distances; a microsecond, where there is none.
    """
    count = len(times)
    if count == 1:
        return FrameTimes([0, 10**MICROSECONDS], 1.0, 0.0)
    since = [time - times[0] for time in times]
    stays = Fraction(count, count - 1)

    def edges_in(decimals: int) -> list[Fraction | int]:
        stamps = [round(10**decimals * time) for time in since]
        return [*stamps, stays * stamps[-1]]

    enough = [d for d in range(MICROSECONDS) if all(abs(10**d * t - round(10**d * t)) <= WHOLE for t in since)]
    decimals = next((d for d in (MICROSECONDS, *reversed(enough)) if are_even(edges_in(d))), MICROSECONDS)
    unit = 10.0 ** -min(decimals, max(MILLISECONDS, min(enough, default=MICROSECONDS)))
    return FrameTimes(edges_in(decimals), float(stays) * since[-1], float(stays) * unit)


def edges_of(pictures: Sequence[Picture], clock: Clock) -> list[Fraction | int]:
    """When each picture comes, from the first, and at last when the last goes; in ticks.

    A step back, or one that is too long, is a break in the timestamps and not in what is shown, as in ffplay.
    """
    stamps, edges = _stamps(pictures, clock), [0]
    for number, picture in enumerate(pictures):
        now, after = stamps[number], stamps[number + 1] if number + 1 < len(stamps) else None
        stays = after - now if None not in (now, after) else 0
        if not 0 < stays <= clock.longest:
            stays = picture.duration or clock.frame
        edges.append(edges[-1] + stays)
    return edges


def _stamps(pictures: Sequence[Picture], clock: Clock) -> list[int | None]:
    """The timestamp of each picture: its pts where the file stores them, unless the dts go back less often."""

    def steps_back(stamps: list[int | None]) -> float:
        known = [stamp for stamp in stamps if stamp is not None]
        return sum(after <= before for before, after in pairwise(known)) if known else math.inf

    kinds = [[picture.pts for picture in pictures], [picture.dts for picture in pictures]]
    return min(kinds if clock.has_pts else reversed(kinds), key=steps_back)
