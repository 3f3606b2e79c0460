"""Clips of rows whose text shows one video."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np

from recipes.data.clips import Clip
from recipes.data.video import VideoReader
from recipes.data.video_settings import VideoSettings

__all__ = ["SETTINGS", "opened", "write_clip"]

SETTINGS = VideoSettings(num_frames=4, height=16, width=24, patch_size=8)


def write_clip(path, frames: int, codec: str = "libx264", size=(48, 64), pixel: Fraction | None = None) -> None:
    """Eight frames a second, frame i grey of 10 i, modulo 256; of pixels that are `pixel` times as wide as high."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if pixel is not None:
            stream.sample_aspect_ratio = pixel
        for i in range(frames):
            shown = av.VideoFrame.from_ndarray(np.full((*size, 3), 10 * i % 256, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(shown))
        container.mux(stream.encode())


def opened(row, folder, feature_size: int) -> Clip:
    """What a row names whose text shows one video."""
    reader = VideoReader(SETTINGS, feature_size)
    _, (found,) = reader.read_row(row | {"prompt": "<video>"}, folder, "rows.jsonl:1")
    return found
