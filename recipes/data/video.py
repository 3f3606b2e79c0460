"""Videos and images of rows, found where the rows say, or features that another encoder made.

A video is a clip that FFmpeg reads, through PyAV (a picture counts as one frame), or a list of files, its frames; features are
.npy or .safetensors, [t, h, w, f]. Where every clip becomes the same grid of tokens, prompts are laid out without opening it;
else its packets and first picture are read. Frames are decoded when a prompt is used (clips.py), or a step ahead (decoding.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import UserError
from megatron_ext.rotary import Video, find_scheme
from megatron_ext.vision.preprocessing import Preprocessor
from recipes.data.clips import Clip
from recipes.data.errors import VideoError
from recipes.data.features import map_features
from recipes.data.frames import Shape, begins
from recipes.data.media_files import existing_file, shape_of
from recipes.data.media_rows import File, write_media
from recipes.data.moments import sample_frames, standing, times_of_frames
from recipes.data.video_settings import VideoSettings

if TYPE_CHECKING:  # processes that decode start without Megatron
    from megatron_ext.models.config import GPTModelConfig

__all__ = ["VideoReader"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoReader:
    """What finds the images and videos of rows.

    Attributes:
        settings: `data.video`.
        feature_size: how many numbers of a token the model sees.
        timed: the model's position scheme counts seconds, so that they are looked up.
        eyes: what makes pictures for the model's tower; None: it has none.
    """

    settings: VideoSettings
    feature_size: int
    timed: bool = False
    eyes: Preprocessor | None = None

    @classmethod
    def of(cls, settings: VideoSettings | None, model: GPTModelConfig) -> VideoReader | None:
        """For a model; None: it is shown none."""
        if settings is None:
            return None
        vision, timed = model.vision, find_scheme(model.position_embedding.scheme).timed
        if settings.timestamps is None and vision.has_tower and vision.kind.apart:
            logger.warning(
                "Qwen3-VL has learnt videos as frames, each behind the moment when it is shown, and data.video.timestamps is not "
                'set: frames follow each other; set it to "<{seconds:.1f} seconds>" (docs/vision.md)'
            )
        if vision.has_tower and vision.kind.apart and vision.video_preprocessing is None:
            logger.warning(
                "model.vision.video_preprocessing is null: each frame of a video may have as many pixels as an image, where "
                "Qwen3-VL's video_preprocessor_config.json bounds those of all frames together (docs/vision.md)"
            )
        eyes = Preprocessor.of(vision) if vision.has_tower else None
        if eyes is not None and eyes.condenses and not eyes.most:
            logger.warning(
                "every image is seen as one tile: model.vision.preprocessing is not of LlavaOnevisionImageProcessor, which cuts "
                "one that is alone in its row into more (docs/vision.md)"
            )
        return cls(settings, vision.feature_size, timed, eyes)

    def read_row(self, row: Mapping[str, Any], folder: Path, where: str) -> tuple[dict[str, Any], tuple[Clip, ...]]:
        """The row with its media written into its text, and those.

        Raises:
            VideoError: a clip that cannot be used, or not as many placeholders as clips.
        """
        clips: list[Clip] = []

        def show(file: File) -> str:
            clips.append(self.open(file, folder, where))
            return clips[-1].text if clips[-1].settings else self.settings.text("video")

        return write_media(row, self.settings, show, where), tuple(clips)

    def open(self, file: File, folder: Path, where: str) -> Clip:
        """A file that a row names, relative to its own file's folder. Decodes no frame yet, unless it must.

        Raises:
            VideoError: the file does not exist, or its features do not fit the model; or it cannot be decoded, where its shape or
                `check` asks for it.
        """
        how = self.settings
        names = (file.name,) if isinstance(file.name, str) else file.name
        paths = [existing_file(name, folder, file.key, where) for name in names]
        if file.kind == "features":
            t, h, w, f = map_features(paths[0], where).shape
            if f != self.feature_size:
                raise VideoError(
                    f"{where}: {paths[0]} has {f} features per token, model.vision.feature_size is {self.feature_size}"
                )
            return Clip(str(paths[0]), Video(t, h, w), None, where)
        if self.eyes is None and how.feature_size != self.feature_size:
            raise VideoError(
                f"{where}: data.video makes {how.feature_size} numbers of a token (3 x frames_per_patch x (patch_size x "
                f"merge_size)^2), model.vision.feature_size is {self.feature_size}"
            )
        clip = (
            self._frame_list(file, paths, where)
            if isinstance(file.name, tuple)
            else self._one_file(file, paths[0], where)
        )
        if how.check:
            _checked(clip)
        return clip

    def _one_file(self, file: File, path: Path, where: str) -> Clip:
        how, video = self.settings, file.kind == "video"
        if self.eyes is not None:
            return self._seen(file, path, where)
        if how.alike and not (video and (self.timed or how.timestamps)):
            grid = how.grid if video else Video(1, how.grid.h, how.grid.w)
            return Clip(str(path), grid, how, where, file.kind)
        shape = shape_of(path, where, how.largest_pixels)
        size = self._size(file.kind, path, where)
        if not video:
            return Clip(str(path), Video(1, *size), how, where, file.kind)
        each = how.frames_per_patch
        count = max(how.frames_of(shape.seconds, shape.pictures, shape.short) // each, 1) * each
        seconds = _of_tokens(self._moments(path, shape, count, where), each)
        return Clip(str(path), Video(len(seconds), *size, seconds), how, where)

    def _moments(self, path: Path, shape: Shape, count: int, where: str) -> list[float]:
        """When frames of a clip are shown: where that is written, when the picture comes, as transformers' processors have it;
        for positions the middle of the stretch that it stands for."""
        if self.settings.timestamps is None:
            return [(i + 0.5) * shape.seconds / count for i in range(count)]
        if not shape.even:
            return begins(path, count, where)
        return [number * shape.seconds / shape.pictures for number in sample_frames(shape.pictures, count)]

    def _seen(self, file: File, path: Path, where: str) -> Clip:
        """For a tower, whose preprocessing says how large its grid is."""
        how, shape, each = (
            self.settings,
            shape_of(path, where, self.settings.largest_pixels),
            self.eyes.frames_per_token,
        )
        count = 1
        if file.kind == "video":
            count = -(-how.frames_of(shape.seconds, shape.pictures, shape.short) // each) * each
        size, seconds = (shape.height, shape.width), None
        (t, h, w), tiled = self._shown(file, count, size, path, where)
        if file.kind == "video":
            seconds = _of_tokens(self._moments(path, shape, count, where), each)
        grid = Video(t, h, w, seconds)
        return Clip(str(path), grid, how, where, file.kind, eyes=self.eyes, size=size, tiled=tiled)

    def _shown(
        self, file: File, count: int, size: tuple[int, int], path: Path, where: str
    ) -> tuple[tuple[int, int, int], bool]:
        """(grid of so many frames, whether they are an image that is cut into tiles)."""
        video = file.kind == "video"
        try:
            return self.eyes.grid(count, *size, video), not video and self.eyes.tiling(*size, file.alone) is not None
        except UserError as error:
            raise VideoError(f"{where}: {path}: {error}") from error

    def _frame_list(self, file: File, paths: Sequence[Path], where: str) -> Clip:
        """With times a clip of such pictures. Without, all frames with fps, and num_frames of them without it. The last is shown
        again until a token has all of its frames."""
        how = self.settings
        if how.timestamps is not None and file.times is None:
            raise VideoError(
                f"{where}: data.video.timestamps writes when a frame is shown, which {file.key} does not say of its frames: "
                'write {"frames": [...], "fps": 2}, or "times" of each'
            )
        if file.times is None:
            numbers = sample_frames(len(paths), how.frames_of(math.inf, len(paths)))
        else:
            said = times_of_frames(file.times)
            numbers = standing(said.edges, how.frames_of(said.seconds, len(paths), said.short))
        each = how.frames_per_patch if self.eyes is None else self.eyes.frames_per_token
        missing = -len(numbers) % each
        seconds = None
        if file.times is not None:
            moments = [file.times[i] for i in numbers]
            # A text says of the last frame that it is shown again; positions go on as they have come.
            step = 0.0 if how.timestamps else (moments[-1] - moments[0]) / max(len(moments) - 1, 1)
            seconds = _of_tokens(moments + [moments[-1] + step * (i + 1) for i in range(missing)], each)
        numbers += numbers[-1:] * missing
        chosen = tuple(str(paths[i]) for i in numbers)
        if self.eyes is None:
            grid = Video(len(chosen) // each, *self._size("video", Path(chosen[0]), where), seconds)
            return Clip(chosen[0], grid, how, where, frames=chosen)
        shape = shape_of(paths[0], where, how.largest_pixels)
        size = shape.height, shape.width
        grid = Video(*self._shown(file, len(chosen), size, paths[0], where)[0], seconds)
        return Clip(chosen[0], grid, how, where, frames=chosen, eyes=self.eyes, size=size)

    def _size(self, kind: str, path: Path, where: str) -> tuple[int, int]:
        """Rows and columns of tokens of a file's pictures."""
        how = self.settings
        if how.max_pixels is None:
            return how.grid_of(kind, 0, 0)
        shape = shape_of(path, where, how.largest_pixels)
        try:
            return how.grid_of(kind, shape.height, shape.width)
        except UserError as error:
            raise VideoError(f"{where}: {path}: {error}") from error


def _of_tokens(moments: Sequence[float], each: int) -> tuple[float, ...]:
    """Of tokens that show so many frames: the mean of the first's and the last's, as Qwen3-VL's processor writes it."""
    return tuple((moments[i] + moments[i + each - 1]) / 2 for i in range(0, len(moments), each))


_decoded: set[tuple] = set()  # clips that have been checked


def _checked(clip: Clip) -> None:
    if clip.key not in _decoded:
        clip.read()
        _decoded.add(clip.key)
