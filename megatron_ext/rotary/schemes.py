"""Position schemes: where the tokens of texts, images and videos stand, and which coordinate turns which frequency.

A scheme is two independent choices:

    position design        what ids [axes, tokens] a medium's tokens get, and where the text after it goes on
    frequency allocation   which axis drives each of the head dimension's pairs

Text stands at start + k on every axis in every scheme, so that all of them agree on text.

Sources: RoPE (arXiv 2104.09864); M-RoPE (Qwen2-VL, arXiv 2409.12191); interleaved M-RoPE (Qwen3-VL, arXiv 2511.21631);
VideoRoPE (arXiv 2502.05173); VRoPE (arXiv 2502.11664).
"""

from __future__ import annotations

import importlib
import itertools
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from megatron_ext.errors import UserError

__all__ = [
    "SCHEMES", "Image", "Item", "PositionTable", "Scheme", "SharedText", "Text", "Video", "find_scheme", "layout",
    "register_scheme",
]  # fmt: skip

LARGEST_ID = 1 << 24  # beyond it fp32 no longer tells neighbours apart


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
    """t frames of h rows and w columns, counted in tokens (after patches are merged); order t, h, w."""

    t: int
    h: int
    w: int

    def __post_init__(self):
        if min(self.t, self.h, self.w) < 1:
            raise UserError(f"{self}: a medium has at least one frame, row and column of tokens")

    @property
    def length(self) -> int:
        return self.t * self.h * self.w


def Image(h: int, w: int) -> Video:
    """h rows and w columns: a video of one frame."""
    return Video(1, h, w)


Item = Text | Video


@dataclass(frozen=True)
class Scheme:
    """A position design and a frequency allocation.

    Attributes:
        name: how a configuration asks for it.
        axes: coordinates of a token.
        media: (t, h, w, start) -> (int64 [axes, t h w], index at which what follows goes on).
        allocation: number of pairs -> the axis that drives each, a list of that many numbers in 0 .. axes - 1.
        arrangement: sections, the number of pairs of each axis -> the same. None: the scheme has no sections.
    """

    name: str
    axes: int
    media: Callable[[int, int, int, int], tuple[Tensor, int]]
    allocation: Callable[[int], Sequence[int]]
    arrangement: Callable[[Sequence[int]], Sequence[int]] | None = None

    def axes_of_pairs(self, pairs: int, sections: Sequence[int] | None = None) -> list[int]:
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
        if len(found) != pairs or any(not isinstance(a, Integral) or not 0 <= a < self.axes for a in found):
            raise UserError(
                f"position scheme {self.name!r} allocates {pairs} pairs as {reprlib.repr(found)}; its allocation must give "
                f"{pairs} integers in 0 .. {self.axes - 1}"
            )
        return found

    def place(self, video: Video, start: int) -> tuple[Tensor, int]:
        """`media` of a video, checked: (int64 [axes, t h w], index at which what follows goes on).

        Raises:
            UserError: anything else, or ids of another type or shape.
        """
        found, shape = self.media(video.t, video.h, video.w, start), (self.axes, video.length)
        match found:
            case (Tensor(dtype=torch.int64) as ids, int(index)) if ids.shape == shape:
                return ids, index
        parts = found if isinstance(found, tuple) else (found,)
        shown = (f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else reprlib.repr(x) for x in parts)
        raise UserError(
            f"position scheme {self.name!r} places {video} at {', '.join(shown)}; its media must give ids torch.int64 {shape} "
            "and the next index, an int"
        )


@dataclass(frozen=True)
class PositionTable:
    """Positions of a sequence of items.

    Attributes:
        ids: int64 [axes, tokens].
        next_index: where a text after the last item starts, on every axis.
        scheme: whose frequency allocation belongs to these ids.
    """

    ids: Tensor
    next_index: int
    scheme: Scheme


def layout(items: Sequence[Item], scheme: str | Scheme = "vrope", start: int = 0) -> PositionTable:
    """Positions of texts and media that follow each other.

    Raises:
        UserError: an unknown scheme, ids that do not fit it, or ids past 2^24, which fp32 angles cannot tell apart.
    """
    scheme = find_scheme(scheme) if isinstance(scheme, str) else scheme
    parts, index = [torch.empty(scheme.axes, 0, dtype=torch.int64)], start
    for item in items:
        if isinstance(item, Text):
            parts.append((index + torch.arange(item.length)).expand(scheme.axes, -1))
            index += 0 if isinstance(item, SharedText) else item.length
        else:
            ids, index = scheme.place(item, index)
            parts.append(ids)
    ids = torch.cat(parts, 1)
    largest = max(index, int(ids.abs().max()) if ids.numel() else 0)
    if largest > LARGEST_ID:
        raise UserError(
            f"positions reach {largest} under scheme {scheme.name!r}: past 2^24 = {LARGEST_ID} neighbouring positions have "
            "the same fp32 angle; use fewer frames or a smaller grid"
        )
    return PositionTable(ids, index, scheme)


def _grid(t: int, h: int, w: int) -> Tensor:
    """int64 [3, t h w]: frame, row and column of every token."""
    return torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).view(-1, 3).t()


def _flattened(t: int, h: int, w: int, start: int) -> tuple[Tensor, int]:
    """RoPE: one token after the other, as if it were text."""
    return start + torch.arange(t * h * w).unsqueeze(0), start + t * h * w


def _axis_by_axis(t: int, h: int, w: int, start: int) -> tuple[Tensor, int]:
    """RoPE-3D: frame, row and column, all counted from the start."""
    return start + _grid(t, h, w), start + max(t, h, w)


def _diagonal(t: int, h: int, w: int, start: int) -> tuple[Tensor, int]:
    """VideoRoPE: frames two apart, rows and columns counted from the frame's own index at its centre."""
    frame, row, column = _grid(t, h, w)
    frame = start + 2 * frame
    return torch.stack((frame, frame + row - (h - 1) // 2, frame + column - (w - 1) // 2)), start + 2 * (t - 1) + 1


def _corner_lines(t: int, h: int, w: int, start: int) -> tuple[Tensor, int]:
    """VRoPE: the distance from each of a frame's four corners; frames follow each other without overlap.

    The four lines' mean is the same for every token of a frame (no place is nearer to the text), and neighbouring
    frames, and video and text, are one step apart.
    """
    frame, row, column = _grid(t, h, w)
    stride = h + w - 1
    lines = [r + c for r, c in itertools.product((row, h - 1 - row), (column, w - 1 - column))]
    return start + frame * stride + torch.stack(lines), start + t * stride


def _in_blocks(sections: Sequence[int]) -> list[int]:
    """t .., h .., w .."""
    return [axis for axis, size in enumerate(sections) for _ in range(size)]


def _blocks(pairs: int) -> list[int]:
    """Quarter, three eighths, three eighths: [16, 24, 24] of 64 pairs, as Qwen2-VL has it, [8, 12, 12] of 32, as GLM-4.1V."""
    t = pairs // 4
    h = (pairs - t) // 2
    return _in_blocks([t, h, pairs - t - h])


def _in_turn(sections: Sequence[int]) -> list[int]:
    """t h w t h w .., as long as h and w have pairs left, and t on all others; what of h or w lies behind the last pair is
    t's, as in transformers."""
    pairs = sum(sections)
    found = [0] * pairs
    for axis in (1, 2):
        for pair in range(axis, min(3 * sections[axis], pairs), 3):
            found[pair] = axis
    return found


# Of mrope_interleaved. Elsewhere the shares are Qwen3-VL's.
PUBLISHED_SECTIONS = {32: (11, 11, 10), 64: (24, 20, 20)}  # Qwen3.5 (a quarter of 256 channels), Qwen3-VL


def _turns(pairs: int) -> list[int]:
    """The published sections, and at other sizes 3/8, 5/16, 5/16."""
    spatial = pairs * 5 // 16
    return _in_turn(PUBLISHED_SECTIONS.get(pairs, (pairs - 2 * spatial, spatial, spatial)))


def _low_frequencies_to_time(pairs: int) -> list[int]:
    """h w h w .. on three quarters, t on the last: on the slow pairs, which do not come round within a video."""
    spatial = pairs * 3 // 4
    return [1 + i % 2 if i < spatial else 0 for i in range(pairs)]


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


register_scheme(Scheme("rope", 1, _flattened, lambda pairs: [0] * pairs))
register_scheme(Scheme("mrope", 3, _axis_by_axis, _blocks, _in_blocks))
register_scheme(Scheme("mrope_interleaved", 3, _axis_by_axis, _turns, _in_turn))
register_scheme(Scheme("videorope", 3, _diagonal, _low_frequencies_to_time))
register_scheme(Scheme("vrope", 4, _corner_lines, lambda pairs: [i % 4 for i in range(pairs)]))


def find_scheme(name: str) -> Scheme:
    """A registered scheme, or the one at a dotted path: "my_package.my_module.my_scheme".

    Raises:
        UserError: no such scheme.
    """
    if name in SCHEMES:
        return SCHEMES[name]
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
