"""What a configuration of eyes may say, and pictures as towers take them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from megatron_ext.errors import UserError
from megatron_ext.hf.eyes import read_tower
from megatron_ext.vision import VisionConfig
from megatron_ext.vision.kinds import read_tower_config
from megatron_ext.vision.preprocessing import Preprocessor
from megatron_ext.vision.tiling import sizes_of
from tests.vision_cases import PREPROCESSING, SIDE, TOWERS, make_tower


def eyes(kind="siglip", **changes) -> VisionConfig:
    given = {"tower_config": read_tower_config(TOWERS[kind], "here"), "preprocessing": PREPROCESSING[kind]}
    return VisionConfig(**given | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feature_size": 7}, "feature_size=7, but the tower computes 24 numbers"),
        ({"connector": "merger"}, "connector=merger does not fit a tower of siglip_vision_model"),
        ({"connector": "mpl"}, "connector must be one of norm_mlp, mlp, onevision, merger"),
        ({"vision_feature_select_strategy": "default"}, "siglip_vision_model, which has no class token"),
        ({"vision_feature_layer": 4}, "vision_feature_layer=4: the tower has hidden states -4 to 3"),
        ({"vision_feature_layer": []}, "the tower has hidden states"),
        ({"cache_gib": -1.0}, "cache_gib=-1.0 must be at least 0"),
    ],
)
def test_settings_that_do_not_fit(changes, words):
    with pytest.raises(UserError, match=words):
        eyes(**changes)


def test_without_a_tower():
    assert VisionConfig(5).connector == "norm_mlp" and not VisionConfig(5).has_tower
    for given, words in (({}, "feature_size is missing"), ({"feature_size": 0}, "feature_size=0 must be at least 1")):
        with pytest.raises(UserError, match=words):
            VisionConfig(**given)
    with pytest.raises(
        UserError, match="connector=onevision brings a tower's frames into fewer tokens, and there is none"
    ):
        VisionConfig(5, connector="onevision")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "vit"}, "a tower of model_type='vit' is not read here, only clip_vision_model, siglip"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1: what is dropped would differ"),
        ({"dropout": 0.1}, "dropout=0.1: what is dropped would differ"),
        ({"image_size": 3}, "image_size=3 holds no patch of patch_size=4"),
        ({"image_size": [8, 8]}, "here: "),
        ({"qk_norm_of_tomorrow": 3}, "qk_norm_of_tomorrow=3 is not known of siglip_vision_model"),
    ],
)
def test_towers_that_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        read_tower_config(TOWERS["siglip"] | changes, "here")


def test_keys_that_no_tower_reads_are_left_out():
    """CLIP's and LLaVA's published files have them."""
    old = {"vocab_size": 32000, "dropout": 0.0, "use_bfloat16": False, "tie_word_embeddings": True, "max_length": 20}
    assert read_tower_config(TOWERS["clip"] | old, "here") == read_tower_config(TOWERS["clip"], "here")


def test_a_model_of_pictures_and_texts_lends_its_tower(rng, tmp_path):
    make_tower(tmp_path, "clip", rng)
    alone = read_tower(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config}))
    assert read_tower(tmp_path) == alone and alone["preprocessing"] == PREPROCESSING["clip"]


@pytest.mark.parametrize("kind", sorted(TOWERS))
def test_pictures_are_those_of_transformers_processor(kind, rng, tmp_path):
    """By its own class, read from a folder; frames of any shape."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING[kind]))
    theirs = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[kind].from_pretrained(str(tmp_path))
    frames = torch.randint(256, (3, 3, 17, 29), dtype=torch.uint8, generator=rng)
    made = Preprocessor.of(eyes(kind)).pixels(frames)
    expected = theirs(list(np.moveaxis(frames.numpy(), 1, -1)), return_tensors="pt")["pixel_values"]
    assert made.values.shape == (3, 3, SIDE, SIDE) and torch.equal(made.values, expected)
    assert made.patches == (3, 2, 2) and Preprocessor.of(eyes(kind)).grid(3, 17, 29) == (3, 2, 2)
    other = Preprocessor.of(eyes(kind)).pixels(frames.flip(0))
    assert other.key != made.key and Preprocessor.of(eyes(kind)).pixels(frames.clone()).key == made.key


@pytest.mark.parametrize("height", [1, 3, 4])
def test_a_picture_as_high_as_others_have_colours_is_seen(height, rng):
    """transformers takes its rows for its colours unless it is told."""
    frames = torch.randint(256, (2, 3, height, 29), dtype=torch.uint8, generator=rng)
    how = PREPROCESSING["siglip"] | {"resample": Picture.Resampling.BICUBIC}
    made = Preprocessor.of(eyes(preprocessing=how)).pixels(frames).values
    for frame, found in zip(frames.permute(0, 2, 3, 1).numpy(), made, strict=True):
        small = Picture.fromarray(frame).resize((SIDE, SIDE), how["resample"])
        expected = (np.asarray(small) / 255 - how["image_mean"]) / how["image_std"]
        np.testing.assert_allclose(found.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_one_tile_of_llava_onevision(rng):
    """An image with bars, as its processor makes each of several; a video's frames without."""
    from transformers import CLIPImageProcessorPil, LlavaOnevisionImageProcessorPil

    said = {
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5, 0.4, 0.6],
        "image_grid_pinpoints": sizes_of(SIDE),
    }
    seen = eyes(preprocessing={"image_processor_type": "LlavaOnevisionImageProcessor"} | said, connector="onevision")
    made = Preprocessor.of(seen)
    frames = torch.randint(256, (2, 3, 17, 29), dtype=torch.uint8, generator=rng)
    listed = list(np.moveaxis(frames.numpy(), 1, -1))
    expected = LlavaOnevisionImageProcessorPil(**said)([listed], return_tensors="pt")["pixel_values"]
    for frame, tile in zip(frames, expected.view(2, 3, SIDE, SIDE), strict=True):
        image = made.pixels(frame.unsqueeze(0))
        assert torch.equal(image.values[0], tile) and not image.video
    video = made.pixels(frames, video=True)
    plain = CLIPImageProcessorPil(**said, do_center_crop=False)(listed, return_tensors="pt")["pixel_values"]
    assert video.video and torch.equal(video.values, plain) and not torch.equal(video.values[0], image.values[0])
    assert made.grid(1, 17, 29) == (1, 2, 2) and made.grid(2, 17, 29, video=True) == (2, 1, 1)


@pytest.mark.parametrize(
    ("preprocessing", "words"),
    [
        (None, "preprocessing is missing: the tower's folder has no preprocessor_config.json"),
        ({"size": {"height": 8, "width": 8}}, "has no image_processor_type"),
        (
            {"image_processor_type": "Mask2FormerImageProcessor"},
            "'Mask2FormerImageProcessor' is not read here, only CLIP",
        ),
        (PREPROCESSING["siglip"] | {"size": {"height": 12, "width": 8}}, "makes pictures of 12 x 8 .* takes 8 x 8"),
    ],
)
def test_preprocessing_that_does_not_fit(preprocessing, words):
    with pytest.raises(UserError, match=words):
        Preprocessor.of(eyes(preprocessing=preprocessing))
