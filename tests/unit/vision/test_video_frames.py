"""How large frames of a video are, by what a folder says of videos; beside transformers' processors in
tests/functional/test_video_processors.py."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.hf import export_hf
from megatron_ext.hf.eyes import read_preprocessing
from megatron_ext.vision import VisionConfig
from megatron_ext.vision.preprocessing import Preprocessor
from tests.hf_folders import hf_model_config, imported
from tests.vision_cases import (
    ONEVISION_SIDE,
    PREPROCESSING,
    QWEN3_VIDEO_PREPROCESSING,
    QWEN_PREPROCESSING,
    TOWERS,
    make_qwen,
    onevision_tower,
    qwen_tower,
)

UNIT = 8  # pixels of a token's side


def seeing(**video) -> Preprocessor:
    said = QWEN3_VIDEO_PREPROCESSING | video
    return Preprocessor.of(
        VisionConfig(tower_config=qwen_tower("qwen3_vl"), preprocessing=QWEN_PREPROCESSING, video_preprocessing=said)
    )


def test_a_video_has_as_many_pixels_as_all_its_frames_may(rng):
    """However many they are, but a token of each; and as few."""
    for _ in range(200):
        frames = 2 * int(torch.randint(1, 20, (), generator=rng))
        height, width = (int(side) for side in torch.randint(UNIT, 200, (2,), generator=rng))
        least, more = (int(x) for x in torch.randint(1, 40_000, (2,), generator=rng))
        most = (
            4 * least + 4 * frames * UNIT**2 + more
        )  # what is made smaller loses less than half of each side to a token's
        made = seeing(size={"shortest_edge": least, "longest_edge": most})
        t, h, w = made.patches(frames, height, width, video=True)
        shown = frames * h * w * 16  # of 4 x 4 pixels
        assert (t, h % 2, w % 2) == (frames // 2, 0, 0)
        assert least <= shown and (min(h, w) == 2 or shown <= most)
        many = made.patches(50 * frames, height, width, video=True)
        assert many[0] == 50 * t and (min(many[1:]) == 2 or 50 * frames * many[1] * many[2] * 16 <= most)
        assert made.patches(frames, height, width) == seeing().patches(frames, height, width), (
            "an image is another thing"
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"video_processor_type": "LlavaNextVideoProcessor"}, "'LlavaNextVideoProcessor' is not read here with a Qwen2VL"),
        ({"video_processor_type": "LlavaOnevisionVideoProcessor"}, "only Qwen2VLVideoProcessor, Qwen3VLVideoProcessor"),
        ({"video_processor_type": None}, "video_processor_type=None"),
        ({"max_pixels": 2048}, "max_pixels are not read by a Qwen3VLVideoProcessor: say shortest_edge and longest_edge"),
        ({"max_video_tokens": "many"}, "max_video_tokens='many' must be a number of tokens"),
        ({"cap_pixels_per_frame": "false"}, "cap_pixels_per_frame='false' must be true or false"),
        ({"size": {"shortest_edge": "64", "longest_edge": 640}}, "must say shortest_edge and longest_edge"),
        ({"do_resize": False}, "video_preprocessing: do_resize=false"),
        ({"patch_size": 8}, "model.vision.video_preprocessing cuts patches as .8, 2, 2. .* takes .4, 2, 2."),
        ({"size": {"height": 8, "width": 8}}, "must say shortest_edge and longest_edge"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        seeing(**changes)


def test_frames_of_another_size_than_the_towers_are_refused():
    size = {"height": ONEVISION_SIDE, "width": ONEVISION_SIDE}
    sizes = [[ONEVISION_SIDE, 2 * ONEVISION_SIDE]]
    images = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": size, "image_grid_pinpoints": sizes}
    films = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 8, "width": 8}}
    fields = {"tower_config": onevision_tower(), "connector": "onevision", "image_grid_pinpoints": sizes}
    Preprocessor.of(VisionConfig(preprocessing=images, video_preprocessing=films | {"size": size}, **fields))
    with pytest.raises(UserError, match="video_preprocessing makes pictures of 8 x 8 pixels, the tower takes 12 x 12"):
        Preprocessor.of(VisionConfig(preprocessing=images, video_preprocessing=films, **fields))
    eyes = VisionConfig(
        tower_config=TOWERS["clip"], preprocessing=PREPROCESSING["clip"], video_preprocessing=films, connector="mlp"
    )
    with pytest.raises(
        UserError, match="with a CLIPImageProcessor, whose videos are frames as images are: .* take the file out"
    ):
        Preprocessor.of(eyes)


def test_a_folder_says_it_in_a_file_of_its_own_or_in_one_for_all(rng, world, tmp_path):
    """And an export of what was read says it again."""
    folder = tmp_path / "model"
    make_qwen(folder, "qwen3_vl", rng)
    said = {"preprocessing": QWEN_PREPROCESSING, "video_preprocessing": QWEN3_VIDEO_PREPROCESSING}
    assert read_preprocessing(folder) == said
    vision = hf_model_config(folder).vision
    assert vision.video_preprocessing == QWEN3_VIDEO_PREPROCESSING
    export_hf(imported(folder, world), tmp_path / "out")
    assert read_preprocessing(tmp_path / "out") == said
    together = {"image_processor": QWEN_PREPROCESSING | {"size": {"shortest_edge": 64, "longest_edge": 640}}}
    (folder / "processor_config.json").write_text(json.dumps(together))
    found = {"preprocessing": together["image_processor"], "video_preprocessing": QWEN3_VIDEO_PREPROCESSING}
    assert read_preprocessing(folder) == found, "the one for all comes first, as in transformers"
    together["video_processor"] = QWEN3_VIDEO_PREPROCESSING | {"fps": 1}
    (folder / "processor_config.json").write_text(json.dumps(together))
    assert read_preprocessing(folder)["video_preprocessing"] == together["video_processor"]


def test_what_a_file_leaves_out_is_what_its_processor_assumes():
    """Numbers of transformers 5.23."""
    nothing = dict.fromkeys(QWEN3_VIDEO_PREPROCESSING) | {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    made = seeing(**nothing | {"video_processor_type": "Qwen3VLVideoProcessor"})
    assert made.patches(2, 64, 96, video=True) == (1, 54, 80)  # at least 131,072 pixels, in all of both frames
    nothing["video_processor_type"] = "Qwen2VLVideoProcessor"
    assert seeing(**nothing).patches(2, 64, 96, video=True) == (1, 66, 98)  # at least 100,352, of each
    made = seeing(**nothing | {"min_pixels": 64, "max_pixels": 1024})
    assert made.patches(2, 64, 96, video=True) == (1, 6, 8)
