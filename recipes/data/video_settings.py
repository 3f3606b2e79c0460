"""What the YAML says of images and videos: how many frames, how large, and how a text names them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ext.errors import UserError
from megatron_ext.kinds import Speed

if TYPE_CHECKING:
    from megatron_ext.rotary import Video

__all__ = ["VideoSettings", "smart_size"]

FRAMES, SIDE = 8, 32  # of a video, and pixels of a frame's height and width, where nothing else is said
ROUNDED = 1e-6  # frames by which seconds x fps may fall short of a whole number, for they are floats
LONGEST_SIDE = 200  # times the shorter one, as the Qwen-VL family has it
POSITIVE = (
    "num_frames", "fps", "fps_min_frames", "fps_max_frames", "height", "width", "min_pixels", "max_pixels",
    "video_max_pixels", "largest_pixels", "patch_size", "merge_size", "frames_per_patch",
)  # fmt: skip


@dataclass(frozen=True)
class VideoSettings:
    """How images and videos become tokens."""

    # Frames taken from every video, evenly spaced in time; a shorter one shows some twice. null: 8, or as fps says.
    num_frames: int | None = None
    # Frames taken for each second of a video, in place of num_frames; not more than it has pictures.
    fps: float | None = None
    # With fps, no fewer frames, as far as the video has them.
    fps_min_frames: int = 4
    # With fps, no more frames.
    fps_max_frames: int = 768
    # Pixels from top to bottom that frames and images are resized to, a multiple of patch_size x merge_size. null: 32, or as
    # max_pixels says.
    height: int | None = None
    # Pixels from left to right, as height; the shape of the clip is not kept.
    width: int | None = None
    # Keep the shape of each image and video, in place of height and width: sides are multiples of patch_size x merge_size, and
    # their product is at most this. Sizes may then differ within a batch.
    max_pixels: int | None = None
    # With max_pixels, for a frame of a video; null: as of an image.
    video_max_pixels: int | None = None
    # With max_pixels, smaller ones are enlarged to so many; null: those of one token.
    min_pixels: int | None = None
    # A file whose picture has more pixels than that is refused: it is a mistake, or made to fill the memory.
    largest_pixels: int = 1 << 27
    # Side, in pixels, of the square that a patch shows. Larger: fewer tokens.
    patch_size: int = 8
    # Patches side by side, and one below the other, that a token shows: those that a vision tower merges.
    merge_size: int = 1
    # Frames that a token shows, which divide num_frames: a video has num_frames / frames_per_patch x height / (patch_size x
    # merge_size) x width / (patch_size x merge_size) tokens. An image is shown so often.
    frames_per_patch: int = 1
    # The tokenizer's token that stands for a token of a video; a text may also say "<video>" where it has another name. It
    # becomes one for each.
    placeholder: str = "<video>"
    # The same of an image; null: that of a video. A text may say "<image>".
    image_placeholder: str | None = None
    # What is written for "<video>", with the placeholder in it once, such as "<|vision_start|><|video_pad|><|vision_end|>"; null:
    # the placeholder alone.
    video_text: str | None = None
    # The same for "<image>".
    image_text: str | None = None
    # Written before each frame of a video, which then stand apart, each as video_text: "<{seconds:.1f} seconds>" is Qwen3-VL's.
    # null: frames follow each other.
    timestamps: str | None = None
    # Decode every clip once before the run starts, so that a broken one is found then and not when it is its turn.
    check: Speed[bool] = False
    # Processes, on each rank, that decode the clips of the next step while this one is computed; 0: they are decoded when they
    # are needed.
    workers: Speed[int] = 0

    def __post_init__(self):
        if self.num_frames is None and self.fps is None:
            object.__setattr__(self, "num_frames", FRAMES)
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value < (1 if isinstance(value, int) else 1e-9):
                least = "above 0" if name == "fps" else "at least 1"
                raise UserError(f"data.video.{name}={value} must be {least}")
        if self.workers < 0:
            raise UserError(f"data.video.workers={self.workers} must be at least 0")
        self._check_frames()
        self._check_size()
        self._check_texts()

    def _check_frames(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise UserError(
                f"data.video.num_frames={self.num_frames} and data.video.fps={self.fps} are both set, and each says how many "
                "frames a video shows: leave one out"
            )
        if self.num_frames is not None and self.num_frames % self.frames_per_patch:
            raise UserError(
                f"data.video.num_frames={self.num_frames} is not divisible by data.video.frames_per_patch="
                f"{self.frames_per_patch}"
            )
        if self.fps_min_frames > self.fps_max_frames:
            raise UserError(
                f"data.video.fps_min_frames={self.fps_min_frames} is more than data.video.fps_max_frames={self.fps_max_frames}"
            )

    def _check_size(self) -> None:
        given = [name for name in ("height", "width") if getattr(self, name) is not None]
        if self.max_pixels is None and (
            alone := [n for n in ("video_max_pixels", "min_pixels") if getattr(self, n) is not None]
        ):
            raise UserError(
                f"data.video.{alone[0]} is set and data.video.max_pixels is not: set it, or leave {alone[0]} out"
            )
        if self.max_pixels is not None and given:
            raise UserError(
                f"data.video.{given[0]}={getattr(self, given[0])} and data.video.max_pixels={self.max_pixels} are both set, and "
                "each says how large a frame is: leave one out"
            )
        for name in ("height", "width") if self.max_pixels is None else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, SIDE)
            if (side := getattr(self, name)) % self.unit:
                times = "" if self.merge_size == 1 else f" x data.video.merge_size={self.merge_size}"
                raise UserError(
                    f"data.video.{name}={side} is not divisible by data.video.patch_size={self.patch_size}{times}"
                )
        for name in ("max_pixels", "video_max_pixels"):
            value, least = getattr(self, name), max(self.unit**2, self.min_pixels or 0)
            if value is not None and value < least:
                raise UserError(
                    f"data.video.{name}={value} must be at least {least}: one token shows {self.unit} x {self.unit} pixels"
                    + (f", and data.video.min_pixels={self.min_pixels}" if self.min_pixels else "")
                )

    def _check_texts(self) -> None:
        for name, token in (("video_text", self.placeholder), ("image_text", self.token("image"))):
            text = getattr(self, name)
            if text is not None and text.count(token) != 1:
                raise UserError(f"data.video.{name}={text!r} must have the placeholder {token!r} in it once")
        if self.timestamps is not None:
            try:
                written = self.timestamps.format(seconds=1.5)
            except (KeyError, IndexError, ValueError) as error:
                raise UserError(
                    f"data.video.timestamps={self.timestamps!r} must be a text with {{seconds}} in it, such as "
                    "'<{seconds:.1f} seconds>'"
                ) from error
            if self.placeholder in written:
                raise UserError(f"data.video.timestamps={self.timestamps!r} must not hold the placeholder")

    @property
    def unit(self) -> int:
        """Pixels of a token's side."""
        return self.patch_size * self.merge_size

    @property
    def alike(self) -> bool:
        """Whether every video has the same grid, which is known without opening it."""
        return self.fps is None and self.max_pixels is None

    @property
    def grid(self) -> Video:
        """Of every video, where all have the same."""
        assert self.alike
        from megatron_ext.rotary import Video  # a command line is checked without torch

        return Video(self.num_frames // self.frames_per_patch, *self.grid_of("video", 0, 0))

    @property
    def feature_size(self) -> int:
        return 3 * self.frames_per_patch * self.unit**2

    def token(self, kind: str) -> str:
        """The placeholder of an image or video."""
        return self.placeholder if kind == "video" or self.image_placeholder is None else self.image_placeholder

    def text(self, kind: str) -> str:
        """What is written for one."""
        return (self.video_text if kind == "video" else self.image_text) or self.token(kind)

    def grid_of(self, kind: str, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image or video whose pictures have this size, in pixels.

        Raises:
            UserError: one side is many times as long as the other.
        """
        if self.max_pixels is None:
            return self.height // self.unit, self.width // self.unit
        most = self.video_max_pixels if kind == "video" and self.video_max_pixels else self.max_pixels
        size = smart_size(height, width, self.unit, self.min_pixels or self.unit**2, most)
        return size[0] // self.unit, size[1] // self.unit

    def frames_of(self, seconds: float, pictures: int, short: float = 0.0) -> int:
        """How many frames are taken from a video.

        Args:
            seconds, pictures: that it has.
            short: by how many seconds that may be too little; Matroska's milliseconds would cost a film its last frame.
        """
        if self.fps is None:
            return self.num_frames
        wanted = int((seconds + short) * self.fps + ROUNDED) if seconds < math.inf else pictures
        return max(min(max(wanted, self.fps_min_frames), self.fps_max_frames, pictures), 1)


def smart_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size next to this one whose sides are multiples of `factor` and whose pixels lie within bounds; the shape is kept as
    nearly as that allows (Qwen2-VL's image processor, `smart_resize`).

    Raises:
        UserError: one side is more than 200 times as long as the other.
    """
    if max(height, width) > LONGEST_SIDE * min(height, width):
        raise UserError(f"its picture of {height} x {width} pixels is more than {LONGEST_SIDE} times as long as wide")
    found = [round(side / factor) * factor for side in (height, width)]
    if math.prod(found) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        found = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(found) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        found = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return found[0], found[1]
