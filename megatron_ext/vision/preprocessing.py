"""Frames as a tower takes them, by its preprocessor_config.json: transformers' image processors on Pillow, without torchvision.

Shape legend: T frames of H x W pixels; t, h, w patches of them, of P x P pixels and D frames each; M x M patches are merged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.vision.kinds import TOWERS
from megatron_ext.vision.pixels import Pixels
from megatron_ext.vision.processors import (
    ALL_TILED,
    TILED,
    frame_size,
    frames_as_images,
    image_processor,
    processor_name,
    video_settings,
)
from megatron_ext.vision.settings import VisionConfig
from megatron_ext.vision.tiling import Tiling, most_tiles, plan_tiling

__all__ = ["Preprocessor"]


@dataclass(frozen=True)
class Preprocessor:
    """Plain data, so that ranks can exchange what holds it.

    Attributes:
        tower, settings: JSON of `VisionConfig.tower_config` and `VisionConfig.preprocessing`.
        video: JSON of `VisionConfig.video_preprocessing`, complete; null: as `settings`.
        condenses, cuts_all: as `VisionConfig` has them.
        most: tiles whose features may stand for an image that is cut; 0: none is.
    """

    tower: str
    settings: str
    condenses: bool = False
    cuts_all: bool = False
    most: float = 0
    video: str = "null"

    @classmethod
    def of(cls, vision: VisionConfig) -> Preprocessor:
        """
        Raises:
            UserError: no preprocessing, one of another kind, or one that makes other pictures than the tower takes.
        """
        if vision.preprocessing is None:
            raise UserError(
                "model.vision.preprocessing is missing: the tower's folder has no preprocessor_config.json; put it there, or "
                "write in the YAML how pictures are resized and normalised"
            )
        tower, settings = (json.dumps(given, sort_keys=True) for given in (vision.tower_config, vision.preprocessing))
        name, most = processor_name(vision.preprocessing), 0
        if (name == ALL_TILED) != vision.cuts_all:
            raise UserError(
                f"model.vision.preprocessing is of {name}, with connector={vision.connector} and vision_aspect_ratio="
                f"{vision.vision_aspect_ratio}: {ALL_TILED}, connector=onevision and vision_aspect_ratio=anyres cut every image, "
                "and go together; take the preprocessor_config.json that belongs to the model"
            )
        if vision.condenses and name in (TILED, ALL_TILED):
            most = most_tiles(vision.vision_aspect_ratio)
        films = vision.video_preprocessing
        films = None if films is None else video_settings(films, vision.preprocessing)
        video = json.dumps(films, sort_keys=True)
        found, config = cls(tower, settings, vision.condenses, vision.cuts_all, most, video), vision.tower_config
        if vision.kind.merges:
            found._check_patches("preprocessing", settings)
            found._check_patches("video_preprocessing", found._making(True))
            return found
        if most and found._sizes != tuple(map(tuple, vision.image_grid_pinpoints)):
            raise UserError(
                "model.vision.preprocessing cuts images in other sizes (image_grid_pinpoints) than model.vision does: take the "
                "preprocessor_config.json that belongs to the model"
            )
        blank, side = torch.zeros(1, 3, 8, 12, dtype=torch.uint8), config["image_size"]
        for film, alone in [(False, False), (False, True), *[(True, False)] * (films is not None)]:
            made = tuple(found.pixels(blank, film, alone).values.shape[2:])
            if made != (side, side):
                raise UserError(
                    f"model.vision.{'video_' * film}preprocessing makes pictures of {made[0]} x {made[1]} pixels, the tower "
                    f"takes {side} x {side}: take the preprocessor_config.json that belongs to it"
                )
        return found

    def _check_patches(self, name: str, making: str) -> None:
        """What a key of model.vision says, against a tower of patches of its own size."""
        processor, config = image_processor(making), self._config
        if not processor.do_resize:
            raise UserError(
                f"model.vision.{name}: do_resize=false, and the tower takes whole patches alone: leave it out"
            )
        if any(type(processor.size.get(edge)) is not int for edge in ("shortest_edge", "longest_edge")):
            raise UserError(
                f"model.vision.{name}: size={dict(processor.size)} must say shortest_edge and longest_edge, the least and most "
                "pixels: take the preprocessor_config.json that belongs to the tower"
            )
        here = tuple(getattr(processor, key, None) for key in ("patch_size", "temporal_patch_size", "merge_size"))
        there = config["patch_size"], config["temporal_patch_size"], config["spatial_merge_size"]
        if here != there:
            raise UserError(
                f"model.vision.{name} cuts patches as {here} (patch_size, temporal_patch_size, merge_size), the tower takes "
                f"{there}: take the preprocessor_config.json that belongs to it"
            )

    @property
    def _config(self) -> dict[str, Any]:
        return json.loads(self.tower)

    def _making(self, video: bool) -> str:
        """JSON of the settings of the image processor that makes pictures, or a video's frames."""
        given = json.loads(self.video) if video else None
        return self.settings if given is None else json.dumps(frames_as_images(given))

    @property
    def any_size(self) -> bool:
        """Whether the grid depends on how large frames are."""
        return TOWERS[self._config["model_type"]].merges

    @property
    def _sizes(self) -> tuple[tuple[int, int], ...]:
        """That images are cut in."""
        return tuple((height, width) for height, width in image_processor(self.settings).image_grid_pinpoints)

    def tiling(self, height: int, width: int, alone: bool = True) -> Tiling | None:
        """Of an image of this size; None: it is not cut.

        Args:
            alone: it is the only image of its row.

        Raises:
            UserError: it is too thin.
        """
        if not self.most or not (alone or self.cuts_all):
            return None
        side = self._config["image_size"]
        return plan_tiling(height, width, self._sizes, side, side // self._config["patch_size"], self.most)

    @property
    def frames_per_token(self) -> int:
        return self._config["temporal_patch_size"] if self.any_size else 1

    def patches(self, frames: int, height: int, width: int, video: bool = False) -> tuple[int, int, int]:
        """(t, h, w) of so many frames of this size."""
        config = self._config
        if not self.any_size:
            side = config["image_size"] // config["patch_size"]
            return frames, side, side
        height, width = self._size(frames, height, width, video)
        return (
            -(-frames // config["temporal_patch_size"]),
            height // config["patch_size"],
            width // config["patch_size"],
        )

    def grid(self, frames: int, height: int, width: int, video: bool = False) -> tuple[int, int, int]:
        """(t, h, w) in media tokens, without one that stands behind them; of an image that is cut, of the whole.

        Raises:
            UserError: one side is more than 200 times the other, or a video that is shown to what sees none.
        """
        self._refuse(video)
        config = self._config
        t, h, w = TOWERS[config["model_type"]].grid(config, self.patches(frames, height, width, video))
        return (t, -(-h // 2), -(-w // 2)) if self.condenses and video else (t, h, w)

    def pixels(self, frames: Tensor, video: bool = False, alone: bool = False) -> Pixels:
        """
        Args:
            frames: uint8 [T, 3, H, W], as a viewer shows them.
            video: they are one's.
            alone: one is the only image of its row.

        Raises:
            UserError: as `grid` and `tiling`.
        """
        self._refuse(video)
        if not video and (tiling := self.tiling(*frames.shape[2:], alone)) is not None:
            return self._tiles(frames, tiling)
        patches = self.patches(len(frames), *frames.shape[2:], video)
        if self.any_size:
            size = self._size(len(frames), *frames.shape[2:], video)
            return Pixels(self._cut(self._normalised(frames, *size, video)), patches, video)
        if processor_name(json.loads(self.settings)) == TILED:
            return Pixels(self._one_tile(frames, video), patches, video)
        # Said, as transformers guesses it by the numbers, of which three may be a height.
        how = {"input_data_format": "channels_last", "return_tensors": "pt"}
        made = image_processor(self.settings)(images=list(frames.permute(0, 2, 3, 1).numpy()), **how)
        return Pixels(made["pixel_values"].float(), patches, video)

    def _refuse(self, video: bool) -> None:
        if video and self.cuts_all:
            raise UserError(
                "a video, and a model with model.vision.vision_aspect_ratio=anyres sees images alone: give frames of it as "
                "images, or choose another model"
            )

    def _tiles(self, image: Tensor, tiling: Tiling) -> Pixels:
        """[1, 3, H, W] -> the whole and the tiles, which its processor makes of an image that is the only one."""
        how = {"input_data_format": "channels_last", "return_tensors": "pt"}
        made = image_processor(self.settings)(images=[[image[0].permute(1, 2, 0).numpy()]], **how)["pixel_values"][0]
        if len(made) != 1 + tiling.rows * tiling.columns:
            raise UserError(
                f"model.vision.preprocessing cuts an image into {len(made) - 1} tiles, the model takes {tiling.rows} x "
                f"{tiling.columns}: its crop_size must be the tower's image_size"
            )
        return Pixels(made.float(), self.patches(len(made), *image.shape[2:]), tiling=tiling)

    def _one_tile(self, frames: Tensor, video: bool) -> Tensor:
        """fp32 [T, 3, S, S], as LLaVA-OneVision's processors make each of several images, squares with bars, and the frames of a
        video, squares without."""
        processor = image_processor(self._making(video))
        if not video:
            grey = tuple(int(mean * 255) for mean in processor.image_mean)
            frames = torch.stack(
                [torch.from_numpy(processor.pad_to_square(f, background_color=grey)) for f in frames.numpy()]
            )
        return self._normalised(frames, processor.size["height"], processor.size["width"], video)

    def _size(self, frames: int, height: int, width: int, video: bool) -> tuple[int, int]:
        """To which frames are resized: multiples of what a token shows, within the limits of pixels, in their own shape."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        config, given = self._config, json.loads(self.video) if video else None
        factor = config["patch_size"] * config["spatial_merge_size"]
        try:
            if given is not None:
                return frame_size(given, frames, height, width, factor, config["temporal_patch_size"])
            size = image_processor(self.settings).size
            return smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
        except ValueError as error:
            raise UserError(f"a picture of {height} x {width} pixels: {error}") from error

    def _normalised(self, frames: Tensor, height: int, width: int, video: bool) -> Tensor:
        """fp32 [T, 3, height, width]."""
        from transformers.image_utils import SizeDict

        processor = image_processor(self._making(video))
        size = SizeDict(height=height, width=width)
        made = []
        for frame in frames.numpy():
            if processor.do_resize:
                frame = super(type(processor), processor).resize(image=frame, size=size, resample=processor.resample)
            if processor.do_rescale:
                frame = processor.rescale(frame, processor.rescale_factor)
            if processor.do_normalize:
                frame = processor.normalize(frame, processor.image_mean, processor.image_std)
            made.append(np.asarray(frame, dtype=np.float32))
        return torch.from_numpy(np.stack(made))

    def _cut(self, frames: Tensor) -> Tensor:
        """[T, 3, H, W] -> [t h w, 3 D P P], the patches of a token one behind the other. A last frame is shown again until a
        patch has all of its frames."""
        config = self._config
        p, d, m = config["patch_size"], config["temporal_patch_size"], config["spatial_merge_size"]
        frames = torch.cat([frames, frames[-1:].expand(-len(frames) % d, -1, -1, -1)])
        total, colours, height, width = frames.shape
        x = frames.reshape(total // d, d, colours, height // (p * m), m, p, width // (p * m), m, p)
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, colours * d * p * p)
