"""One decoded picture as a viewer shows it: turned as its file says, on white, in the colours of an ordinary screen.

FFmpeg hands over what was encoded. A phone's film lies on its side with a matrix that stands it up; a transparent pixel
holds a colour that nobody sees; high dynamic range looks washed out on a screen without it. What a viewer does about each
is done here.

Pixels that are not square (a sample aspect ratio) need no care: whatever the shape of a picture, it is resized to the
height and width that were asked for, which sets the shape of its pixels anew. Interlaced pictures are shown as they are
stored, both fields woven, as ffplay does.

Shape legend: H, W a picture's pixels before it is resized.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.reformatter import VideoReformatter

__all__ = ["UPRIGHT", "Turn", "blend", "in_screen_colours", "paint", "turn", "turn_of"]

# (a, b, c, d): the pixel at (x, y), from the middle, is shown at (a x + c y, b x + d y). One of a and b is zero.
Turn = tuple[int, int, int, int]
UPRIGHT: Turn = (1, 0, 0, 1)
# A film is shown a quarter turn or none where its matrix is this near to one: sin(1 degree).
NEARLY = 0.0175
# FFmpeg's numbers of what a frame carries beside its pixels, beyond those that PyAV has names for.
UNNAMED = range(28, 48)
# FFmpeg's numbers of curves and of primaries.
PQ, HLG, BT709 = 16, 18, 1
WHITE = 203  # nits
BT2020_TO_BT709 = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))
# Decoders that give an alpha channel to files that keep nothing in that byte.
PADDED = {"rawvideo", "huffyuv"}


def paint(frame: VideoFrame, height: int, width: int, scaler: VideoReformatter, codec: str = "") -> np.ndarray:
    """The frame as it is shown, resized: uint8 [height, width, 3].

    Raises:
        UserError: it is shown at an angle that is no quarter turn.
    """
    how = turn_of(frame)
    if how[1]:  # the small picture is turned, not the large one
        height, width = width, height
    return turn(_colours(_on_white(frame, scaler, codec), height, width, scaler, frame), how)


def in_screen_colours(frame: VideoFrame, scaler: VideoReformatter) -> np.ndarray:
    """The frame's own pixels, neither turned nor blended: uint8 [H, W, 3]."""
    return _colours(frame, frame.height, frame.width, scaler, frame)


def _colours(frame: VideoFrame, height: int, width: int, scaler: VideoReformatter, tagged: VideoFrame) -> np.ndarray:
    """uint8 [height, width, 3]; the numbers mean what `tagged` says."""
    if tagged.color_trc not in (PQ, HLG):
        return scaler.reformat(frame, width, height, "rgb24").to_ndarray()
    signal = scaler.reformat(frame, width, height, "rgb48le").to_ndarray() / np.float32(65535)
    return _from_high_range(signal, tagged.color_trc, tagged.color_primaries != BT709)


def _from_high_range(signal: np.ndarray, curve: int, wide: bool) -> np.ndarray:
    """High dynamic range, fp32 [H, W, 3] in [0, 1], to sRGB, uint8: reference white becomes white, and so does all above it.

    Source: ITU-R BT.2100 (curves; HLG on a display of 1000 nits), BT.2408 (reference white), BT.2087 (colours). FFmpeg's
    scaler can do it, too, after three seconds of preparation for each size of a picture.
    """
    if curve == PQ:
        power = signal ** (32 / 2523)
        light = (np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610) * 10000
    else:
        bright = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        scene = np.where(signal <= 0.5, signal**2 / 3, bright)
        light = 1000 * scene * (scene @ np.float32([0.2627, 0.6780, 0.0593]))[..., None] ** 0.2
    if wide:
        light = light @ np.float32(BT2020_TO_BT709).T
    light = np.clip(light / WHITE, 0, 1)
    screen = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * screen).astype(np.uint8)


def turn(picture: np.ndarray, how: Turn) -> np.ndarray:
    """[H, W, 3] -> [H, W, 3], or [W, H, 3] after a quarter turn."""
    a, b, c, d = how
    if b:
        picture, a, d = picture.swapaxes(0, 1), c, b
    return np.ascontiguousarray(picture[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1])


def turn_of(frame: VideoFrame) -> Turn:
    """How the frame is shown, from the display matrix of its file, or its EXIF orientation, which FFmpeg makes one of.

    Raises:
        UserError: it is shown at an angle that is no quarter turn.
    """
    matrix = _display_matrix(frame)
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d = (int(x) for x in matrix[:5])
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > NEARLY * max(straight, crossed):
        raise UserError(
            f"it is shown at an angle ({frame.rotation} degrees); only quarter turns can be read: encode it upright"
        )
    signs = [1 if x > 0 else -1 for x in (a, b, c, d)]
    if crossed > straight:
        return 0, signs[1], signs[2], 0
    return (signs[0], 0, 0, signs[3]) if straight else UPRIGHT


def _display_matrix(frame: VideoFrame) -> np.ndarray | None:
    """int32 [9], row by row; None for a frame without one."""
    try:
        found = frame.side_data
    except ValueError:  # PyAV stumbles over what it has no name for, as EXIF
        found = _without_unnamed(frame).side_data
    try:
        return np.frombuffer(bytes(found["DISPLAYMATRIX"]), np.int32)
    except KeyError:
        return None


def _without_unnamed(frame: VideoFrame) -> VideoFrame:
    """The frame without the side data that PyAV has no name for."""
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
    filters = [source, *(graph.add("sidedata", f"mode=delete:type={n}") for n in UNNAMED), graph.add("buffersink")]
    for one, next_one in zip(filters, filters[1:], strict=False):
        one.link_to(next_one)
    graph.configure()
    source.push(frame)
    return filters[-1].pull()


def _on_white(frame: VideoFrame, scaler: VideoReformatter, codec: str) -> VideoFrame:
    """Transparent pixels blended with white before they are resized, so that a hidden colour reaches no neighbour.

    White, as the data pipelines of Qwen-VL and vLLM have it: figures and formulas are drawn in black.
    """
    from av import VideoFrame

    if not (frame.format.has_palette or any(part.is_alpha for part in frame.format.components)):
        return frame
    pixels = scaler.reformat(frame, format="rgba").to_ndarray()  # [H, W, 4]
    alpha = pixels[..., 3:]
    if alpha.min() == 255 or (codec in PADDED and not alpha.any()):
        return frame
    return VideoFrame.from_ndarray(blend(pixels[..., :3], alpha), format="rgb24")


def blend(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] over white, by uint8 [H, W, 1]."""
    return ((colours * alpha.astype(np.uint16) + 255 * (255 - alpha.astype(np.uint16)) + 127) // 255).astype(np.uint8)
