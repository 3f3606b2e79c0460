"""Videos and images of rows: found, kept, cut into patches (frames.py decodes them); or features that another encoder made.

A row of a JSONL file names one with "video" (a clip that FFmpeg reads, through PyAV; a picture counts as one frame) or
"features" (.npy or .safetensors, [t, h, w, f]). Every clip becomes the same grid of tokens, so that prompts can be laid
out without opening it; frames are decoded when a prompt is used.

Shape legend: t, h, w tokens of the grid, f numbers of a token: 3 colours x frames x pixels of its patch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.rotary import Video
from recipes.cli.config import at_least
from recipes.data.errors import VideoError
from recipes.data.frames import read_frames

__all__ = [
    "Clip",
    "VideoReader",
    "VideoSettings",
    "open_clip",
    "patchify",
]

# Of frames and features that a process keeps in memory: a prompt is used for sampling, scoring and training.
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class VideoSettings:
    """How clips become tokens."""

    # Frames taken from every clip, evenly spaced in time; a shorter clip shows some twice.
    num_frames: int = 8
    # Pixels from top to bottom that frames are resized to, a multiple of patch_size.
    height: int = 32
    # Pixels from left to right that frames are resized to, a multiple of patch_size; the shape of the clip is not kept.
    width: int = 32
    # Side, in pixels, of the square that a token shows. Larger: fewer tokens.
    patch_size: int = 8
    # Frames that a token shows, which divide num_frames: a clip has num_frames / frames_per_patch x height / patch_size
    # x width / patch_size tokens.
    frames_per_patch: int = 1
    # The tokenizer's token that stands for a token of a video. "<video>" in a row's text becomes one for each.
    placeholder: str = "<video>"

    def __post_init__(self):
        at_least("data.video", self, 1, "num_frames", "height", "width", "patch_size", "frames_per_patch")
        for name, part in (("height", "patch_size"), ("width", "patch_size"), ("num_frames", "frames_per_patch")):
            if getattr(self, name) % getattr(self, part):
                raise UserError(
                    f"data.video.{name}={getattr(self, name)} is not divisible by data.video.{part}={getattr(self, part)}"
                )

    @property
    def grid(self) -> Video:
        return Video(
            self.num_frames // self.frames_per_patch, self.height // self.patch_size, self.width // self.patch_size
        )

    @property
    def feature_size(self) -> int:
        return 3 * self.frames_per_patch * self.patch_size**2


@dataclass(frozen=True)
class Clip:
    """One video of a row. Plain data, so that ranks can exchange prompts.

    Attributes:
        path: of the clip or of its features.
        grid: its tokens.
        settings: how frames become tokens; None for features.
        where: file and line of the row, for messages.
    """

    path: str
    grid: Video
    settings: VideoSettings | None
    where: str

    def features(self) -> Tensor:
        """fp32 [t h w, f]; the file is opened unless it was read a short while ago."""
        found = _recent.get(self)
        if self.settings is None:
            return found.flatten(0, 2).float()
        return patchify(found, self.settings.patch_size, self.settings.frames_per_patch)

    def read(self) -> Tensor:
        """What the file holds: frames, uint8 [frames, 3, height, width], or features [t, h, w, f] in their own type."""
        how = self.settings
        if how is None:
            return _map_features(Path(self.path), self.where).clone()
        return read_frames(self.path, how.num_frames, how.height, how.width, self.where)


class _Recent:
    """What was read last, up to `limit` bytes. Rows that name the same file share it."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.kept: OrderedDict[tuple, Tensor] = OrderedDict()

    def get(self, clip: Clip) -> Tensor:
        key = (clip.path, clip.settings)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        found = clip.read()
        if found.nbytes <= self.limit:
            self.kept[key] = found
            self.size += found.nbytes
            while self.size > self.limit:
                self.size -= self.kept.popitem(last=False)[1].nbytes
        return found


_recent = _Recent(CACHE_BYTES)


def open_clip(row: dict, folder: Path, settings: VideoSettings, feature_size: int, where: str) -> Clip | None:
    """The clip a row names, relative to its file's folder; None for a row without one. Reads no frames yet.

    Raises:
        VideoError: the file does not exist, or its features do not fit the model.
    """
    named = [key for key in ("video", "features") if row.get(key) is not None]
    if not named:
        return None
    if len(named) == 2:
        raise VideoError(f"{where}: both video and features; a row carries one of them")
    name = row[named[0]]
    if not isinstance(name, str) or not name:
        raise VideoError(f"{where}: {named[0]} must be the name of a file, got {name!r}")
    try:
        path = folder / Path(name).expanduser()
        exists = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long; ~ of an unknown user
        shown = name if len(name) <= 80 else name[:77] + "..."
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{where}: {named[0]} {shown} is no usable file name: {reason}") from error
    if not exists:
        raise VideoError(f"{where}: {named[0]} {path} does not exist (names are relative to the JSONL file)")
    if named[0] == "features":
        t, h, w, f = _map_features(path, where).shape
        if f != feature_size:
            raise VideoError(f"{where}: {path} has {f} features per token, model.vision.feature_size is {feature_size}")
        return Clip(str(path), Video(t, h, w), None, where)
    if settings.feature_size != feature_size:
        raise VideoError(
            f"{where}: data.video makes {settings.feature_size} numbers of a token (3 x frames_per_patch x patch_size^2), "
            f"model.vision.feature_size is {feature_size}"
        )
    return Clip(str(path), settings.grid, settings, where)


@dataclass(frozen=True)
class VideoReader:
    """What finds the videos of rows: `data.video`, and how many numbers of a token the model sees."""

    settings: VideoSettings
    feature_size: int

    def read_row(
        self, row: dict, tokens: Sequence[int], placeholder: int, folder: Path, where: str
    ) -> tuple[Clip | None, list[int]]:
        """The row's clip, and its tokens with one placeholder for each token of the clip.

        Raises:
            VideoError: a clip that cannot be used, or not as many placeholders as clips.
        """
        clip = open_clip(row, folder, self.settings, self.feature_size, where)
        return clip, _expand(tokens, placeholder, [] if clip is None else [clip.grid.length], where)


def patchify(frames: Tensor, patch: int, frames_per_patch: int = 1) -> Tensor:
    """uint8 [T, 3, H, W] -> fp32 [t h w, f] in [-1, 1], tokens in the order t, h, w; numbers in that of a 3D convolution."""
    total, channels, height, width = frames.shape
    x = frames.float() / 127.5 - 1
    x = x.reshape(
        total // frames_per_patch, frames_per_patch, channels, height // patch, patch, width // patch, patch
    )  # [t, frames, 3, h, y, w, x]
    return x.permute(0, 3, 5, 2, 1, 4, 6).flatten(3).flatten(0, 2)


def _map_features(path: Path, where: str) -> Tensor:
    """[t, h, w, f] of a .npy or of a .safetensors with one tensor, in its own type; numbers are read when they are used."""
    try:
        if path.suffix == ".npy":
            import numpy as np

            found = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                names = list(file.keys())
                if len(names) != 1:
                    raise UserError(f"it holds {len(names)} tensors, expected one")
                found = file.get_tensor(names[0])  # mapped, too
        else:
            raise UserError("features are a .npy or a .safetensors file")
    except Exception as error:  # safetensors raises its own, numpy several
        raise VideoError(f"{where}: cannot read features {path}: {str(error)[:200]}") from error
    if found.dim() != 4 or not found.numel() or not found.is_floating_point():
        raise VideoError(f"{where}: {path} holds {found.dtype} {tuple(found.shape)}, expected floats [t, h, w, f]")
    return found


def _expand(tokens: Sequence[int], placeholder: int, lengths: Sequence[int], where: str) -> list[int]:
    """One placeholder for each video -> one for each of its tokens.

    Raises:
        VideoError: not as many placeholders as videos.
    """
    found = sum(token == placeholder for token in tokens)
    if found != len(lengths):
        raise VideoError(f"{where}: the text has {found} video placeholders, the row has {len(lengths)} videos")
    expanded: list[int] = []
    waiting = iter(lengths)
    for token in tokens:
        expanded += [token] * (next(waiting) if token == placeholder else 1)
    return expanded
