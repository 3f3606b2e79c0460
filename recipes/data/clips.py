"""An image or video of a row: what stands for it in the text, its frames as the model is shown them, and those that were read
last (frames.py decodes them).

Shape legend: t, h, w tokens of the grid, f numbers of a token: 3 colours x frames x pixels of its patch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.rotary import Video
from megatron_ext.vision import Pixels
from megatron_ext.vision.preprocessing import Preprocessor
from megatron_ext.vision.tiling import Tiling
from recipes.data.features import map_features
from recipes.data.frames import read_frames
from recipes.data.video_settings import VideoSettings

__all__ = ["CACHE_BYTES", "Clip", "clip_content", "patchify", "read_ahead"]

# Of frames and features that a process keeps in memory: a prompt is used for sampling, scoring and training.
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Clip:
    """One image or video of a row. Plain data, so that ranks can exchange prompts.

    Attributes:
        path: of the file or of its features; of a list of frames, the first.
        grid: its tokens, and when its frames are shown, where that is known.
        settings: how frames become tokens; None for features.
        where: file and line of the row, for messages.
        kind: image or video.
        frames: the files of a list of frames, those that are shown.
        eyes: what makes pictures for the model's tower of frames, which then keep their size; None: a token is the pixels of its
            patches.
        size: of its frames, height and width, where there are eyes.
        tiled: its tower sees it in tiles.
    """

    path: str
    grid: Video
    settings: VideoSettings | None
    where: str
    kind: str = "video"
    frames: tuple[str, ...] = ()
    eyes: Preprocessor | None = None
    size: tuple[int, int] | None = None
    tiled: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        return self.frames or (self.path,)

    @property
    def key(self) -> tuple:
        """What it shows; rows of the same key share it."""
        return self.files, self.settings, self.kind, self.grid.t, self.grid.h, self.grid.w, self.eyes, self.tiled

    @property
    def items(self) -> tuple[Video, ...]:
        """What stands in the text for it: itself, or each of its frames, where their seconds are written between them; and what
        its connector puts behind it, the tiles of an image or a token."""
        if self.settings is None or self.settings.timestamps is None or self.kind == "image":
            found = (self.grid,)
        else:
            found = tuple(Video(1, self.grid.h, self.grid.w) for _ in range(self.grid.t))
        if self._tiling is not None:
            return (*found, Video(1, *self._tiling.grid))
        return (*found, Video(1, 1, 1)) if self._ends else found

    @property
    def _ends(self) -> bool:
        """Whether something of its connector's stands behind it."""
        return self.eyes is not None and self.eyes.condenses

    @property
    def _tiling(self) -> Tiling | None:
        return self.eyes.tiling(*self.size) if self.tiled and self.eyes is not None else None

    @property
    def text(self) -> str:
        """What is written for it, with one placeholder for each of `items`."""
        how = self.settings
        if how.timestamps is None or self.kind == "image":
            found = how.text(self.kind)
        else:
            found = "".join(how.timestamps.format(seconds=s) + how.text("video") for s in self.grid.seconds)
        if not self._ends:
            return found
        before, token, behind = found.rpartition(how.token(self.kind))
        return before + 2 * token + behind

    @property
    def count(self) -> int:
        """Frames that are read."""
        each = self.settings.frames_per_patch if self.eyes is None else self.eyes.frames_per_token
        return 1 if self.kind == "image" else self.grid.t * each

    def pixels(self) -> Pixels:
        """What the model's tower is shown."""
        values, tiling = _recent.get(self), self._tiling
        frames = self.count if tiling is None else len(values)
        video = self.kind == "video"
        return Pixels(values, self.eyes.patches(frames, *self.size, video), video, tiling)

    def features(self) -> Tensor:
        """fp32 [t h w, f]; the file is opened unless it was read a short while ago."""
        found = _recent.get(self)
        if self.settings is None:
            return found.flatten(0, 2).float()
        return patchify(found, self.settings.unit, self.settings.frames_per_patch)

    def read(self) -> Tensor:
        """What the file holds: frames, uint8 [frames, 3, height, width], or as a tower is shown them, or features [t, h, w, f] in
        their own type."""
        how = self.settings
        if how is None:
            return map_features(Path(self.path), self.where).clone()
        height, width = self.size or (self.grid.h * how.unit, self.grid.w * how.unit)
        found = self._frames(height, width)
        return found if self.eyes is None else self.eyes.pixels(found, self.kind == "video", self.tiled).values

    def _frames(self, height: int, width: int) -> Tensor:
        how = self.settings
        if self.frames:
            pictures = [read_frames(name, 1, height, width, self.where, how.largest_pixels) for name in self.frames]
            return torch.cat(pictures)
        found = read_frames(self.path, self.count, height, width, self.where, how.largest_pixels)
        return found if self.kind == "video" or self.eyes is not None else found.repeat(how.frames_per_patch, 1, 1, 1)


class _Recent:
    """What was read last, up to `limit` bytes. Rows that name the same file share it.

    Attributes:
        coming: what other processes are reading.
        asked: what they have been asked for last.
    """

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.kept: OrderedDict[tuple, Tensor] = OrderedDict()
        self.coming: dict[tuple, Future] = {}
        self.asked: set[tuple] = set()

    def get(self, clip: Clip) -> Tensor:
        key = clip.key
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        found = self.coming.pop(key).result() if key in self.coming else clip.read()
        if found.nbytes <= self.limit:
            self.kept[key] = found
            self.size += found.nbytes
            while self.size > self.limit:
                self.size -= self.kept.popitem(last=False)[1].nbytes
        return found


_recent = _Recent(CACHE_BYTES)


def read_ahead(clips: Collection[Clip], read: Callable[[Clip], Future]) -> None:
    """Have other processes read what is not there yet. What they had been asked for before the last time, and nobody has used, is
    given up.

    Args:
        read: begins to read one.
    """
    asked = {clip.key for clip in clips}
    for key in _recent.coming.keys() - asked - _recent.asked:
        _recent.coming.pop(key).cancel()
    _recent.asked = asked
    for clip in clips:
        if clip.key not in _recent.kept and clip.key not in _recent.coming:
            _recent.coming[clip.key] = read(clip)


def clip_content(clips: Sequence[Clip]) -> Tensor | list[Pixels]:
    """What a prompt shows the model: features, fp32 [tokens of all of them, f], or what its tower is shown of each."""
    if any(clip.eyes is not None for clip in clips):
        return [clip.pixels() for clip in clips]
    return torch.cat([clip.features() for clip in clips])


def patchify(frames: Tensor, patch: int, frames_per_patch: int = 1) -> Tensor:
    """uint8 [T, 3, H, W] -> fp32 [t h w, f] in [-1, 1], tokens in the order t, h, w; numbers in that of a 3D convolution."""
    total, channels, height, width = frames.shape
    x = frames.float() / 127.5 - 1
    x = x.reshape(
        total // frames_per_patch, frames_per_patch, channels, height // patch, patch, width // patch, patch
    )  # [t, frames, 3, h, y, w, x]
    return x.permute(0, 3, 5, 2, 1, 4, 6).flatten(3).flatten(0, 2)
