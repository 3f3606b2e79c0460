"""transformers' image processors on Pillow, by what a model's files say of pictures; and what they say of a video's frames.

transformers' video processors need torchvision, so frames are made by the image processor of the same numbers, which rounds in
another order (tests/functional/test_video_processors.py).
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

from megatron_ext.errors import UserError

__all__ = [
    "ALL_TILED",
    "PROCESSORS",
    "TILED",
    "VIDEO_PROCESSORS",
    "frame_size",
    "frames_as_images",
    "image_processor",
    "processor_name",
    "video_settings",
]

# Names in preprocessor_config.json, without "Fast" or "Pil" behind them: of towers that see frames of one size, and of Qwen's.
ONE_SIZE = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
# Those that cut into tiles: an image that is alone in its row, and every image.
TILED = "LlavaOnevisionImageProcessor"
ALL_TILED = "LlavaNextImageProcessor"
ANY_SIZE = "Qwen2VLImageProcessor"
PROCESSORS = (*ONE_SIZE, TILED, ALL_TILED, ANY_SIZE)
OLD = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
# Names in video_preprocessor_config.json: whose images their frames are like, and what they assume where nothing is said. Of the
# first limits of pixels are of a frame, of the second of all frames together.
EACH_FRAME, WHOLE_VIDEO = "Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor"
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
VIDEO_PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    EACH_FRAME: (
        ANY_SIZE,
        CLIP
        | {
            "size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2},
            "patch_size": 14,
            "max_video_tokens": 128_000,
        },
    ),
    WHOLE_VIDEO: (
        ANY_SIZE,
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16, "max_video_tokens": 768}
        | {"size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2}},
    ),
    "LlavaOnevisionVideoProcessor": (TILED, CLIP | {"size": {"height": 384, "width": 384}}),
}
# Qwen2-VL's older words for the two limits.
OLD_LIMITS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
# What of a video processor's settings says how a frame is made. Which frames are taken is data.video's.
OF_FRAMES = (
    "size", "patch_size", "temporal_patch_size", "merge_size", "resample", "do_resize", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip
# Of a video's tokens those that Qwen2-VL's limit leaves for pictures.
FOR_PICTURES = 0.9
ABOVE_LEAST = 1.05


def processor_name(given: dict[str, Any]) -> str:
    """Which of `PROCESSORS` it is."""
    named = given.get("image_processor_type") or given.get("feature_extractor_type")
    if named is None:
        raise UserError(
            "model.vision.preprocessing has no image_processor_type: take the preprocessor_config.json of the tower"
        )
    name = str(named).removesuffix("Fast").removesuffix("Pil")
    name = OLD.get(name, name)
    if name not in PROCESSORS:
        raise UserError(
            f"model.vision.preprocessing: image_processor_type={named!r} is not read here, only {', '.join(PROCESSORS)}"
        )
    return name


@functools.lru_cache(maxsize=8)
def image_processor(settings: str):
    """
    Args:
        settings: JSON of a preprocessor_config.json.

    Raises:
        UserError: transformers does not take them.
    """
    import transformers

    given: dict[str, Any] = json.loads(settings)
    name = processor_name(given)
    kept = {key: value for key, value in given.items() if not key.endswith("_type") and not key.startswith("_")}
    try:
        return getattr(transformers, f"{name}Pil")(**kept)
    except Exception as error:  # of any kind that transformers' own checks raise
        raise UserError(f"model.vision.preprocessing: transformers' {name} refuses it: {str(error)[:200]}") from error


def video_settings(video: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """A video_preprocessor_config.json with what its processor assumes where it says nothing.

    Args:
        images: settings of the model's image processor.

    Raises:
        UserError: a video processor that is not read here or does not go with the images', or a limit that it does not read.
    """
    key, named, like = "model.vision.video_preprocessing", video.get("video_processor_type"), processor_name(images)
    known = [name for name, (its, _) in VIDEO_PROCESSORS.items() if its == like]
    if named not in known:
        others = f"only {', '.join(known)}" if known else "whose videos are frames as images are"
        raise UserError(
            f"{key}: video_processor_type={named!r} is not read here with a {like}, {others}: take the "
            "video_preprocessor_config.json that belongs to the model, or take the file out of the folder"
        )
    found = VIDEO_PROCESSORS[named][1] | {name: value for name, value in video.items() if value is not None}
    if old := {OLD_LIMITS[name]: found.pop(name) for name in OLD_LIMITS if name in found}:
        if named != EACH_FRAME:
            raise UserError(
                f"{key}: min_pixels and max_pixels are not read by a {named}: say shortest_edge and longest_edge in size"
            )
        found["size"] = found["size"] | old
    if type(capped := found.get("cap_pixels_per_frame", False)) is not bool:
        raise UserError(f"{key}: cap_pixels_per_frame={capped!r} must be true or false")
    tokens = found.get("max_video_tokens", 1)
    if type(tokens) is not int or tokens < 1:
        raise UserError(f"{key}: max_video_tokens={tokens!r} must be a number of tokens")
    return found


def frames_as_images(video: dict[str, Any]) -> dict[str, Any]:
    """Settings of the image processor that makes frames as `video_settings` say."""
    like = VIDEO_PROCESSORS[video["video_processor_type"]][0]
    return {key: video[key] for key in OF_FRAMES if key in video} | {"image_processor_type": like}


def frame_size(
    video: dict[str, Any], frames: int, height: int, width: int, factor: int, temporal: int
) -> tuple[int, int]:
    """To which size frames of a video are brought, as transformers' Qwen2VLVideoProcessor and Qwen3VLVideoProcessor do.

    Args:
        video: `video_settings`.
        factor: sides are multiples of it.
        temporal: frames of a patch.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    least, most = (video["size"][edge] for edge in OLD_LIMITS.values())
    capped = video.get("cap_pixels_per_frame")
    if video["video_processor_type"] == EACH_FRAME:
        if capped:
            share = int(video["max_video_tokens"] * factor**2 * FOR_PICTURES) * temporal // frames
            most = max(min(most, share), int(least * ABOVE_LEAST))
        return smart_resize(height, width, factor, least, most)
    frames = max(frames, temporal)  # one alone is shown again
    if capped:
        share = min(video["max_video_tokens"] * factor**2, most // frames)
        most = max(share, int(least * ABOVE_LEAST)) * frames
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    found = smart_resize(height, width, factor, 0, math.inf)  # refuses what is too thin
    shown = round(frames / temporal) * temporal * math.prod(found)
    if shown > most:
        shrink = math.sqrt(frames * height * width / most)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if shown < least:
        grow = math.sqrt(least / (frames * height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return found
