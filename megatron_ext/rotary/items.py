"""What follows what in a sequence: texts, images and videos, counted in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ext.errors import UserError

__all__ = ["Image", "Item", "SharedText", "Text", "Video"]


@dataclass(frozen=True)
class Text:
    """`length` tokens, one after the other."""

    length: int

    def __post_init__(self):
        if self.length < 0:
            raise UserError(f"{self}: a text has 0 tokens or more")


@dataclass(frozen=True)
class SharedText(Text):
    """A text that starts where the last item ended and does not advance it: one of several continuations."""


@dataclass(frozen=True)
class Video:
    """t frames of h rows and w columns, counted in tokens (after patches are merged); order t, view, h, w.

    Attributes:
        seconds: when each of the t frames is shown, ascending; None: not known.
        views: cameras that show the same moment, each with h rows. A scheme that knows of no views takes them for one picture
            whose rows follow each other.
    """

    t: int
    h: int
    w: int
    seconds: tuple[float, ...] | None = None
    views: int = 1

    def __post_init__(self):
        if min(self.t, self.h, self.w, self.views) < 1:
            raise UserError(f"{self}: a medium has at least one frame, row and column of tokens, and one view")
        if self.seconds is None:
            return
        object.__setattr__(self, "seconds", tuple(float(moment) for moment in self.seconds))
        moments = self.seconds
        if len(moments) != self.t or not all(map(math.isfinite, moments)) or list(moments) != sorted(moments):
            raise UserError(f"{self}: seconds are one finite number for each of the {self.t} frames, ascending")

    def __repr__(self) -> str:
        more = "" if self.seconds is None else f", seconds={self.seconds}"
        more += "" if self.views == 1 else f", views={self.views}"
        return f"Video(t={self.t}, h={self.h}, w={self.w}{more})"

    @property
    def length(self) -> int:
        return self.t * self.views * self.h * self.w


def Image(h: int, w: int) -> Video:
    """h rows and w columns: a video of one frame."""
    return Video(1, h, w)


Item = Text | Video
