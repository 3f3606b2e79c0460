"""Position schemes: where the tokens of texts, images and videos stand, and which coordinate turns which frequency.

A scheme is two independent choices:

    position design        what ids [axes, tokens] a medium's tokens get, and where the text after it goes on
    frequency allocation   which axis drives each of the head dimension's pairs, or none

Text stands at start + k on every axis in every scheme, so that all of them agree on text, but for pairs that no axis turns.
The published ones are in published.py.
"""

from __future__ import annotations

import importlib
import inspect
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.rotary.items import Item, SharedText, Text, Video

__all__ = ["SCHEMES", "PositionTable", "Scheme", "find_scheme", "layout", "register_scheme"]

LARGEST_ID = 1 << 24  # beyond it fp32 no longer tells neighbours apart


@dataclass(frozen=True)
class Scheme:
    """A position design and a frequency allocation.

    Attributes:
        name: how a configuration asks for it.
        axes: coordinates of a token.
        media: (t, h, w, start) -> (ids [axes, t h w], index at which what follows goes on); `of_video`: (video, start) -> those.
        allocation: number of pairs -> the axis that drives each, a list of that many numbers in 0 .. axes - 1; None in it is a
            pair that nothing turns (NoPE).
        arrangement: sections, the number of pairs of each axis -> the same. None: the scheme has no sections.
        dtype: of ids and next index: int64, or float64 for ids between whole numbers.
        of_video: `media` reads a `Video` itself, with its seconds and views.
        timed: the seconds of a video's frames say where they stand.
        variant: numbers by name -> the scheme with these in place of the defaults, as "name(number=1.5)" asks for it; None: it
            has none.
    """

    name: str
    axes: int
    media: Callable[..., tuple[Tensor, float]]
    allocation: Callable[[int], Sequence[int | None]]
    arrangement: Callable[[Sequence[int]], Sequence[int]] | None = None
    dtype: torch.dtype = torch.int64
    of_video: bool = False
    timed: bool = False
    variant: Callable[..., Scheme] | None = None

    def axes_of_pairs(self, pairs: int, sections: Sequence[int] | None = None) -> list[int | None]:
        """`allocation`, or `arrangement` where there are sections, checked.

        Raises:
            UserError: not one axis of this scheme for each pair; or sections that do not add up to the pairs, or of a
                scheme that has none.
        """
        if sections is None:
            found = list(self.allocation(pairs))
        elif self.arrangement is None:
            known = ", ".join(name for name, scheme in SCHEMES.items() if scheme.arrangement)
            raise UserError(
                f"position scheme {self.name!r} divides its pairs by itself and takes no sections, got {list(sections)}; "
                f"leave them out, or choose one of {known}"
            )
        elif len(sections) != self.axes or min(sections) < 0 or sum(sections) != pairs:
            raise UserError(
                f"position scheme {self.name!r} needs sections of {self.axes} numbers of at least 0 that add up to the {pairs} "
                f"pairs that are rotated, got {list(sections)}"
            )
        else:
            found = list(self.arrangement(sections))
        known = (a is None or (isinstance(a, Integral) and 0 <= a < self.axes) for a in found)
        if len(found) != pairs or not all(known):
            raise UserError(
                f"position scheme {self.name!r} allocates {pairs} pairs as {reprlib.repr(found)}; its allocation must give "
                f"{pairs} integers in 0 .. {self.axes - 1}, or None for a pair that nothing turns"
            )
        return found

    def place(self, video: Video, start: float) -> tuple[Tensor, float]:
        """`media` of a video, checked: (ids [axes, tokens] of `dtype`, index at which what follows goes on).

        Raises:
            UserError: anything else, or ids of another type or shape.
        """
        if self.of_video:
            found = self.media(video, start)
        else:
            found = self.media(video.t, video.views * video.h, video.w, start)
        whole, shape = self.dtype == torch.int64, (self.axes, video.length)
        match found:
            case (Tensor() as ids, int(index)) if ids.shape == shape and ids.dtype == self.dtype:
                return ids, index
            case (Tensor() as ids, float(index)) if ids.shape == shape and ids.dtype == self.dtype and not whole:
                return ids, index
        parts = found if isinstance(found, tuple) else (found,)
        shown = (f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else reprlib.repr(x) for x in parts)
        raise UserError(
            f"position scheme {self.name!r} places {video} at {', '.join(shown)}; its media must give ids {self.dtype} {shape} "
            f"and the next index, {'an int' if whole else 'a number'}"
        )


@dataclass(frozen=True)
class PositionTable:
    """Positions of a sequence of items.

    Attributes:
        ids: [axes, tokens] of the scheme's type, int64 or float64.
        next_index: where a text after the last item starts, on every axis.
        scheme: whose frequency allocation belongs to these ids.
    """

    ids: Tensor
    next_index: float
    scheme: Scheme


def layout(items: Sequence[Item], scheme: str | Scheme = "vrope", start: float = 0) -> PositionTable:
    """Positions of texts and media that follow each other.

    Raises:
        UserError: an unknown scheme, ids that do not fit it, or ids past 2^24, which fp32 angles cannot tell apart.
    """
    scheme = find_scheme(scheme) if isinstance(scheme, str) else scheme
    parts, index = [torch.empty(scheme.axes, 0, dtype=scheme.dtype)], start
    for item in items:
        if isinstance(item, Text):
            parts.append((index + torch.arange(item.length, dtype=scheme.dtype)).expand(scheme.axes, -1))
            index += 0 if isinstance(item, SharedText) else item.length
        else:
            ids, index = scheme.place(item, index)
            parts.append(ids)
    ids = torch.cat(parts, 1)
    largest = max(index, ids.abs().max().item() if ids.numel() else 0)
    if largest > LARGEST_ID:
        raise UserError(
            f"positions reach {largest} under scheme {scheme.name!r}: past 2^24 = {LARGEST_ID} neighbouring positions have "
            "the same fp32 angle; use fewer frames or a smaller grid"
        )
    return PositionTable(ids, index, scheme)


SCHEMES: dict[str, Scheme] = {}


def register_scheme(scheme: Scheme) -> Scheme:
    """Make a scheme known by its name.

    Raises:
        UserError: the name is taken.
    """
    if SCHEMES.get(scheme.name, scheme) is not scheme:
        raise UserError(f"there is a position scheme {scheme.name!r} already")
    SCHEMES[scheme.name] = scheme
    return scheme


def find_scheme(name: str) -> Scheme:
    """A registered scheme, also with numbers of one's own, "v2pe(stride=64)"; or the one at a dotted path:
    "my_package.my_module.my_scheme".

    Raises:
        UserError: no such scheme, or it has no such number.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    if given := re.fullmatch(r"(\w+)\((.*)\)", name):
        return _variant(*given.groups())
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"no position scheme at {name!r}: {error}") from error
        if isinstance(found, Scheme):
            return found
        raise UserError(f"{name!r} is a {type(found).__name__}, not a position Scheme")
    raise UserError(
        f"unknown position scheme {name!r}: choose one of {', '.join(SCHEMES)}, or a dotted path to your own"
    )


@lru_cache
def _variant(name: str, numbers: str) -> Scheme:
    """`numbers`: "stride=64, alpha=0.5"."""
    scheme = find_scheme(name)
    known = inspect.signature(scheme.variant).parameters if scheme.variant else {}
    given = {}
    for part in filter(None, numbers.replace(" ", "").split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            has = ", ".join(f"{k}={p.default}" for k, p in known.items()) or "no numbers"
            raise UserError(f"position scheme '{name}({numbers})': {name} has {has}, and nothing called {key!r}")
        try:
            given[key] = float(value)
        except ValueError as error:
            raise UserError(f"position scheme '{name}({numbers})': {key} must be a number, got {value!r}") from error
    return replace(scheme.variant(**given) if given else scheme, name=f"{name}({numbers})")
