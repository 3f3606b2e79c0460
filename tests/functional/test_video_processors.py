"""Frames of videos beside transformers' own video processors, which need torchvision: as large, and the same pixels within what
two libraries' rounding makes.

`make trl` installs torchvision in a folder beside TRL, or TRL_PYTHON names the interpreter of such an environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.vision import VisionConfig
from megatron_ext.vision.preprocessing import Preprocessor
from tests.conftest import fresh_generator
from tests.harness import ROOT
from tests.vision_cases import ONEVISION_SIDE, QWEN_PREPROCESSING, onevision_tower, qwen_tower

TORCHVISION = Path(os.environ.get("TRL_PYTHON", ROOT / ".venv-trl/bin/python")).parent.parent / "torchvision"
pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(
        not TORCHVISION.is_dir(),
        reason=f"no {TORCHVISION}: `make trl` installs it, or TRL_PYTHON names an interpreter beside which it is",
    ),
]

EACH, SIDES, FRAMES = 25, (9, 90), (2, 9)
PIXEL = 1 / 255
# Of Qwen's: which video processor, and of which frames or videos the limits of pixels are.
QWEN = {
    "qwen2_vl": ("Qwen2VLVideoProcessor", (1, 1)),
    "qwen3_vl": ("Qwen3VLVideoProcessor", FRAMES),
}


def draw(rng: torch.Generator, least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, (), generator=rng))


def frames(rng: torch.Generator) -> torch.Tensor:
    """uint8 [T, 3, H, W]: smooth, or noise."""
    shape = (draw(rng, *FRAMES), 3, draw(rng, *SIDES), draw(rng, *SIDES))
    if draw(rng, 0, 1):
        return torch.randint(256, shape, dtype=torch.uint8, generator=rng)
    coarse = torch.rand((*shape[:2], 4, 4), generator=rng) * 255
    return torch.nn.functional.interpolate(coarse, size=shape[2:], mode="bicubic").clamp(0, 255).to(torch.uint8)


def qwen_case(family: str, rng: torch.Generator) -> tuple[VisionConfig, dict]:
    name, of = QWEN[family]
    least = draw(rng, 1, 20) * 64 * draw(rng, *of)
    size = {"shortest_edge": least, "longest_edge": least + draw(rng, 0, 60) * 64 * draw(rng, *of)}
    said = {key: value for key, value in QWEN_PREPROCESSING.items() if key != "image_processor_type"}
    said |= {"video_processor_type": name, "size": size, "image_mean": [0.4, 0.5, 0.6], "fps": 2}
    short = draw(rng, 0, 5)
    if short == 0:  # what is left out is assumed
        for key in ("size", "image_mean"):
            del said[key]
    elif short == 1 and family == "qwen2_vl":
        said |= {"min_pixels": said.pop("size")["shortest_edge"]}
    if draw(rng, 0, 2) == 0:
        said |= {"cap_pixels_per_frame": True, "max_video_tokens": draw(rng, 4, 60)}
    eyes = {"tower_config": qwen_tower(family), "preprocessing": QWEN_PREPROCESSING, "video_preprocessing": said}
    return VisionConfig(**eyes), said


def onevision_case(rng: torch.Generator) -> tuple[VisionConfig, dict]:
    size = {"height": ONEVISION_SIDE, "width": ONEVISION_SIDE}
    said = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": size, "image_std": [0.2, 0.3, 0.4]}
    images = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": size}
    images["image_grid_pinpoints"] = sizes = [[ONEVISION_SIDE, 2 * ONEVISION_SIDE]]
    eyes = {"tower_config": onevision_tower(), "preprocessing": images, "video_preprocessing": said}
    return VisionConfig(**eyes, connector="onevision", image_grid_pinpoints=sizes), said


@pytest.mark.parametrize("family", [*QWEN, "llava_onevision"])
def test_frames_are_those_of_transformers_video_processor(family, tmp_path):
    rng = fresh_generator()
    cases = [qwen_case(family, rng) if family in QWEN else onevision_case(rng) for _ in range(EACH)]
    videos = [frames(rng) for _ in cases]
    save_file({str(i): video for i, video in enumerate(videos)}, str(tmp_path / "frames.safetensors"))
    (tmp_path / "cases.json").write_text(json.dumps([said for _, said in cases]))
    command = [sys.executable, ROOT / "tests/programs/video_processors.py", tmp_path, TORCHVISION]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    made = load_file(str(tmp_path / "made.safetensors"))
    for number, ((eyes, said), video) in enumerate(zip(cases, videos, strict=True)):
        ours, theirs = Preprocessor.of(eyes), made[f"{number}.pixels"]
        shown = ours.pixels(video, video=True)
        if family in QWEN:
            assert list(shown.patches) == made[f"{number}.grid"][0].tolist(), (said, video.shape)
            assert shown.patches == ours.patches(len(video), *video.shape[2:], video=True)
            # [p, 3 D P P]: in pixels of their own size again
            found, expected = (x.unflatten(1, (3, -1)).transpose(1, 2) for x in (shown.values, theirs))
        else:
            found, expected = shown.values.movedim(1, -1), theirs[0].movedim(1, -1)
        assert found.shape == expected.shape
        off = ((found - expected) * torch.tensor(said["image_std"])).abs()
        noise = (video.float().diff(dim=2).abs().mean()) > 50
        # Both round and cut off to bytes between rows and columns, in another order: plain in noise, of which seen were 21 at a
        # single place and 0.4 in the mean, and of smooth pictures 2 and 0.2.
        assert off.max() < (64 if noise else 4.01) * PIXEL and off.mean() < (1 if noise else 0.5) * PIXEL, (
            said,
            video.shape,
        )
