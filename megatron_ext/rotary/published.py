"""The published position schemes, each as its formula, with its source.

RoPE (arXiv 2104.09864); M-RoPE (Qwen2-VL, 2409.12191); interleaved M-RoPE (Qwen3-VL, 2511.21631) and with spatial reset
(MRoPE-I, 2510.23095); VideoRoPE (2502.05173); HoPE (2505.20444); V2PE (2412.09616); Circle-RoPE (2505.16416); VRoPE
(2502.11664). What transformers makes of Qwen-VL and Ernie-4.5-VL are schemes of their own: there text goes on behind the longer
side of a medium, however many frames that has.

Below, s is the start, and t, h, w are a token's frame, row and column among T, H, W.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.rotary.items import Video
from megatron_ext.rotary.schemes import Scheme, register_scheme

__all__ = ["circle_rope", "hope", "qwen2_5_vl", "v2pe"]

Placed = tuple[Tensor, float]


def _grid(*sizes: int) -> Tensor:
    """int64 [sizes, their product]: frame, row and column of every token."""
    return torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, len(sizes)).t()


def _flattened(t: int, h: int, w: int, start: int) -> Placed:
    """RoPE: one token after the other, as if it were text."""
    return start + torch.arange(t * h * w).unsqueeze(0), start + t * h * w


def _axis_by_axis(t: int, h: int, w: int, start: int) -> Placed:
    """RoPE-3D: frame, row and column, all counted from the start."""
    return start + _grid(t, h, w), start + max(t, h, w)


def _to_the_longer_side(t: int, h: int, w: int, start: int) -> Placed:
    """The same ids as transformers places them (get_rope_index of qwen2_vl, qwen3_vl, qwen3_5, ernie4_5_vl_moe)."""
    return start + _grid(t, h, w), start + max(h, w)


def _spatial_reset(t: int, h: int, w: int, start: int) -> Placed:
    """MRoPE-I: frames counted from the start, rows and columns from 0."""
    return torch.tensor([[start], [0], [0]]) + _grid(t, h, w), start + max(t, h, w)


def _diagonal(stride: int) -> Callable[..., Placed]:
    """Frames `stride` apart, rows and columns counted from the frame's own index at its centre."""

    def media(t: int, h: int, w: int, start: float) -> Placed:
        frame, row, column = _grid(t, h, w)
        frame = start + stride * frame
        ids = torch.stack((frame, frame + row - (h - 1) // 2, frame + column - (w - 1) // 2))
        return ids, start + stride * (t - 1) + 1

    return media


def _lines(t: int, sizes: Sequence[int], start: int) -> Placed:
    """VRoPE: the distance from each of a frame's corners; frames follow each other without overlap.

    The lines' mean is the same for every token of a frame (no place is nearer to the text), and neighbouring frames, and video
    and text, are one step apart. Of n axes there are 2^n corners, axis 0 the most significant, L = sum of sizes - n + 1.
    """
    frame, *places = _grid(t, *sizes)
    both_ways = [(place, size - 1 - place) for place, size in zip(places, sizes, strict=True)]
    stride = sum(sizes) - len(sizes) + 1
    lines = torch.stack([sum(line) for line in itertools.product(*both_ways)])
    return start + frame * stride + lines, start + t * stride


def _corner_lines(t: int, h: int, w: int, start: int) -> Placed:
    """Four corners."""
    return _lines(t, (h, w), start)


def _corner_lines_of_views(video: Video, start: int) -> Placed:
    """Eight, of a cube of views, rows and columns. With one view the first four are VRoPE's, and so are the others."""
    return _lines(video.t, (video.views, video.h, video.w), start)


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


def _low_frequencies_still(pairs: int) -> list[int | None]:
    """HoPE: as VideoRoPE, but what time would turn is not turned at all."""
    return [axis or None for axis in _low_frequencies_to_time(pairs)]


def _rows_and_columns_first(sections: Sequence[int]) -> list[int]:
    """Ernie: h w h w .., then t. Its sections are rows, columns, time; transformers' code needs rows and columns alike."""
    rows, columns, _ = sections
    if rows != columns:
        raise UserError(f"position scheme 'ernie4_5_vl' has as many pairs of rows as of columns, got {list(sections)}")
    return [1 + i % 2 if i < rows + columns else 0 for i in range(sum(sections))]


def _rows_and_columns(pairs: int) -> list[int]:
    """[22, 22, 20] of 64 pairs, as Ernie-4.5-VL has it."""
    spatial = pairs * 11 // 32
    return _rows_and_columns_first([spatial, spatial, pairs - 2 * spatial])


def _every(axes: int) -> Callable[[int], list[int]]:
    """Pair i is turned by axis i mod `axes`."""
    return lambda pairs: [i % axes for i in range(pairs)]


_all_alike = _every(1)


def _positive(scheme: str, **numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise UserError(f"position scheme {scheme!r}: {name}={value} must be above 0 and finite")


def qwen2_5_vl(tokens_per_second: float = 2.0) -> Scheme:
    """Qwen2.5-VL: frame t stands at s + int(its seconds x tokens_per_second), rows and columns as before; text goes on behind the
    longer side (transformers, qwen2_5_vl, get_rope_index). 2 is that of the published 3B to 72B. Frames whose seconds are not
    known are one second apart, as there."""
    _positive("qwen2_5_vl", tokens_per_second=tokens_per_second)

    def media(video: Video, start: int) -> Placed:
        ids = _grid(video.t, video.views * video.h, video.w)
        ids = torch.stack((_ticks(video, tokens_per_second)[ids[0]], ids[1], ids[2]))
        return start + ids, start + max(video.views * video.h, video.w)

    return Scheme("qwen2_5_vl", 3, media, _blocks, _in_blocks, of_video=True, timed=True, variant=qwen2_5_vl)


def _ticks(video: Video, per_second: float) -> Tensor:
    """int64 [t]. Frames that are equally far apart are counted in fp32, as transformers counts them: where their product is a
    whole number but for rounding, its place is theirs."""
    moments = torch.tensor(range(video.t) if video.seconds is None else video.seconds, dtype=torch.float64)
    moments = moments - moments[0]
    number = torch.arange(video.t)
    step = moments[1] if video.t > 1 else moments[0]
    if torch.allclose(moments, number * step, rtol=1e-6, atol=1e-6):
        return (number * (step.float() * per_second)).long()
    return (moments * per_second).long()


def hope(stride: float = 1.0) -> Scheme:
    """HoPE: VideoRoPE's diagonal with frames `stride` apart, and slow pairs that nothing turns, in text, too.
    Its authors draw the stride of every video from 0.5, 0.75, 1, 1.25, 1.5 while they train and choose one afterwards; here
    one stands for a run, so that what is sampled and what is scored agree."""
    _positive("hope", stride=stride)
    diagonal = _diagonal(stride)

    def media(t: int, h: int, w: int, start: float) -> Placed:
        ids, index = diagonal(t, h, w, float(start))
        return ids.double(), index

    return Scheme("hope", 3, media, _low_frequencies_still, dtype=torch.float64, variant=hope)


def v2pe(stride: float = 64.0) -> Scheme:
    """V2PE: a frame's tokens share `stride` positions, token k of a medium (from 1) at s - 1 + k stride / (H W); what follows
    goes on at the next whole number (its code: `rope_pos_id_stride / num_image_token`, a tile being a frame; 64 is what it is
    evaluated with)."""
    _positive("v2pe", stride=stride)

    def media(t: int, h: int, w: int, start: float) -> Placed:
        ids = start - 1 + stride / (h * w) * torch.arange(1, t * h * w + 1, dtype=torch.float64)
        return ids.unsqueeze(0), start + math.ceil(t * stride)

    return Scheme("v2pe", 1, media, _all_alike, dtype=torch.float64, variant=v2pe)


def circle_rope(radius: float = 10.0, alpha: float = 0.5) -> Scheme:
    """Circle-RoPE: a frame's tokens on a circle around the line on which text stands (t = h = w), so that every one of them is as
    far from a text token as every other.

    Token (h, w) at the angle alpha A + (1 - alpha) 2 pi (h W + w) / (H W), where A is its angle around the frame's centre, spread
    over 0 .. 2 pi; the circle's plane is spanned by (-1, 1, 0) / sqrt 2 and (-1, -1, 2) / sqrt 6 in the order w, h, t. Frames
    follow each other one step apart along the line, and text one step behind the largest id. 10 and 0.5 are its published
    configuration; its alternation with M-RoPE from layer to layer (AGE) is left out.
    """
    _positive("circle_rope", radius=radius)
    if not 0 <= alpha <= 1:
        raise UserError(f"position scheme 'circle_rope': alpha={alpha} must lie in 0 .. 1")

    def media(t: int, h: int, w: int, start: float) -> Placed:
        _, row, column = _grid(1, h, w).double()
        around = torch.atan2(row - (h - 1) / 2, column - (w - 1) / 2)
        spread = around.max() - around.min()
        if spread > 0:
            around = (around - around.min()) / spread * 2 * math.pi
        angle = alpha * around + (1 - alpha) * torch.arange(h * w) / (h * w) * 2 * math.pi
        x, y = radius / 2**0.5 * angle.cos(), radius / 6**0.5 * angle.sin()
        circle = torch.stack((2 * y, x - y, -x - y))  # t, h, w
        ids = start + (circle.unsqueeze(1) + torch.arange(t).view(1, -1, 1)).flatten(1)
        return ids, ids.max().item() + 1

    return Scheme("circle_rope", 3, media, _blocks, _in_blocks, dtype=torch.float64, variant=circle_rope)


register_scheme(Scheme("rope", 1, _flattened, _all_alike))
register_scheme(Scheme("mrope", 3, _axis_by_axis, _blocks, _in_blocks))
register_scheme(Scheme("mrope_interleaved", 3, _axis_by_axis, _turns, _in_turn))
register_scheme(Scheme("mrope_i", 3, _spatial_reset, _turns, _in_turn))
register_scheme(Scheme("videorope", 3, _diagonal(2), _low_frequencies_to_time))
register_scheme(Scheme("vrope", 4, _corner_lines, _every(4)))
register_scheme(Scheme("vrope_views", 8, _corner_lines_of_views, _every(8), of_video=True))
register_scheme(Scheme("qwen2_vl", 3, _to_the_longer_side, _blocks, _in_blocks))
register_scheme(qwen2_5_vl())
register_scheme(Scheme("qwen3_vl", 3, _to_the_longer_side, _turns, _in_turn))
register_scheme(Scheme("ernie4_5_vl", 3, _to_the_longer_side, _rows_and_columns, _rows_and_columns_first))
register_scheme(hope())
register_scheme(v2pe())
register_scheme(circle_rope())
