"""Rows with images and videos: the files that they name, how they are read, and what is seen of them."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from PIL import Image as Picture

from megatron_ext.rotary import Video
from recipes.data.rows import Prompt, load_prompts
from recipes.data.video import VideoReader
from recipes.data.video_settings import VideoSettings

__all__ = ["FIXED", "OWN_SIZE", "MEDIA_TEMPLATE", "greys", "media_of", "picture", "prompts"]

# Frames of a video are 16 x 16 pixels, a token shows 8 x 8.
FIXED = VideoSettings(num_frames=2, height=16, width=16)
OWN_SIZE = VideoSettings(num_frames=2, max_pixels=1024, video_max_pixels=512)
MEDIA_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
)


def picture(path, height: int = 16, width: int = 16, grey: int = 100) -> None:
    Picture.fromarray(np.full((height, width, 3), grey, dtype=np.uint8)).save(path)


def prompts(folder, tokenizer, settings: VideoSettings, *rows: dict, load: Callable = load_prompts, **more) -> list:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(path, tokenizer, 2000, VideoReader(settings, settings.feature_size, **more))


def media_of(prompt: Prompt) -> list[Video]:
    return [item for item in prompt.for_model().items if isinstance(item, Video)]


def greys(prompt: Prompt) -> list[int]:
    """Of each medium, its first token's."""
    features, found, row = prompt.for_model().content, [], 0
    for item in media_of(prompt):
        found.append(round(float((features[row].mean() + 1) * 127.5)))
        row += item.length
    return found
