"""LLaVA-1.6: every image in tiles, and no maximum of them; tokens, pictures and features are those of transformers."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.hf import export_hf, read_hf_config
from megatron_ext.hf.multimodal import read_vision
from megatron_ext.planner.activations import places_of
from megatron_ext.vision import VisionConfig
from megatron_ext.vision.preprocessing import Preprocessor
from megatron_ext.vision.tiling import plan_tiling
from tests.hf_folders import imported, set_config
from tests.vision_cases import NEXT, PREPROCESSING, TOWERS, make_next, make_onevision, next_preprocessing

PUBLISHED = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
LONG = tuple(
    (384 * h, 384 * w) for h in range(1, 11) for w in range(1, 11) if h * w <= 10
)  # as Granite Vision has them


def eyes(kind: str = "clip", **changes) -> VisionConfig:
    given = {"tower_config": TOWERS[kind], "preprocessing": next_preprocessing(kind), "connector": "onevision"}
    return VisionConfig(**given | NEXT | changes)


@pytest.mark.parametrize(("side", "patches", "sizes"), [(336, 24, PUBLISHED), (384, 27, LONG), (8, 2, PUBLISHED)])
def test_as_many_tokens_as_transformers_processor_writes(side, patches, sizes, rng):
    """300 sizes, thin ones among them; the published models' are the first case."""
    from transformers import LlavaNextProcessor

    sizes = tuple((height * side // sizes[0][0], width * side // sizes[0][0]) for height, width in sizes)
    processor = SimpleNamespace(image_processor=SimpleNamespace(image_grid_pinpoints=sizes), patch_size=side // patches)
    processor.num_additional_image_tokens, thin = 0, 0
    processor._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(processor)
    for height, width in torch.empty(300, 2).uniform_(1.2, 8, generator=rng).exp().int().tolist():
        expected = LlavaNextProcessor._get_number_of_features(processor, height, width, side, side)
        try:
            rows, columns = plan_tiling(height, width, sizes, side, patches, math.inf).grid
        except UserError:  # no row of it is left, of which transformers shows the whole alone
            assert expected == patches**2 and patches % 2 == 0
            thin += 1
            continue
        assert patches**2 + rows * columns == expected, (height, width)
    assert thin < 200


@pytest.mark.parametrize("kind", TOWERS)
def test_what_is_seen_of_images_of_any_size(kind, rng, world, tmp_path):
    """Several in a row: pictures bitwise those of transformers' processor, features those of its model."""
    from transformers import LlavaNextImageProcessorPil

    theirs = make_next(tmp_path / "model", kind, rng)
    model = imported(tmp_path / "model", world)
    processor = LlavaNextImageProcessorPil.from_pretrained(str(tmp_path / "model"))
    made = Preprocessor.of(model.model_config.vision)
    drawn = torch.randint(8, 48, (12, 2), generator=rng).tolist()
    images = [
        torch.randint(256, (1, 3, height, width), generator=rng, dtype=torch.uint8)
        for height, width in [(16, 32), (32, 16), (20, 21), (8, 31), (31, 8), (200, 40), *drawn]
    ]
    found = [made.pixels(image) for image in images]
    listed = [image[0].permute(1, 2, 0).numpy() for image in images]
    given = processor(listed, input_data_format="channels_last", return_tensors="pt")
    for pixels, expected in zip(found, given["pixel_values"], strict=True):
        assert torch.equal(pixels.values, expected[: len(pixels.values)])
        assert not torch.count_nonzero(expected[len(pixels.values) :])
    with torch.no_grad():
        expected = theirs.get_image_features(**given).pooler_output
        features = model.media_projector(model.vision_tower(found), found)
    lengths = [4 + math.prod(pixels.tiling.grid) for pixels in found]
    assert lengths == [len(one) for one in expected] and (features - torch.cat(expected)).abs().max() < 1e-4
    assert {(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)} == {(p.tiling.rows, p.tiling.columns) for p in found}
    assert all(
        torch.equal(made.pixels(image, alone=True).values, p.values) for image, p in zip(images, found, strict=True)
    )


def test_what_does_not_go_together_is_refused(rng, tmp_path):
    made = Preprocessor.of(eyes())
    frames = torch.zeros(2, 3, 9, 9, dtype=torch.uint8)
    for video in (lambda: made.grid(2, 9, 9, video=True), lambda: made.pixels(frames, video=True)):
        with pytest.raises(
            UserError, match="vision_aspect_ratio=anyres sees images alone: give frames of it as images"
        ):
            video()
    together = "is of {}, with connector={} and vision_aspect_ratio={}: LlavaNextImageProcessor, .* go together"
    for changes, said in (
        ({"preprocessing": PREPROCESSING["clip"]}, ("CLIPImageProcessor", "onevision", "anyres")),
        ({"connector": "mlp"}, ("LlavaNextImageProcessor", "mlp", "anyres")),
        ({"vision_aspect_ratio": "anyres_max_4"}, ("LlavaNextImageProcessor", "onevision", "anyres_max_4")),
    ):
        with pytest.raises(UserError, match=together.format(*said)):
            Preprocessor.of(eyes(**changes))
    with pytest.raises(UserError, match="cuts images in other sizes .image_grid_pinpoints. than model.vision does"):
        Preprocessor.of(eyes(image_grid_pinpoints=[[8, 8]]))
    smaller = next_preprocessing("siglip") | {"crop_size": {"height": 4, "width": 4}}
    with pytest.raises(
        UserError, match=r"cuts an image into \d+ tiles, the model takes \d x \d: its crop_size must be"
    ):
        Preprocessor.of(eyes("siglip", preprocessing=smaller))
    make_onevision(tmp_path, rng)
    set_config(tmp_path, vision_aspect_ratio="anyres")
    with pytest.raises(
        UserError, match="vision_aspect_ratio=anyres is that of model_type=llava_next, and model_type=llava_o"
    ):
        read_vision(json.loads((tmp_path / "config.json").read_text()), tmp_path, "here")


def test_what_a_file_leaves_out_is_what_transformers_assumes(tmp_path):
    """Its own configuration as it comes, around a small language model: CLIP of 336 pixels, with keys that no tower reads."""
    from transformers import AutoConfig, LlavaNextConfig

    text = AutoConfig.for_model("mistral", sliding_window=None).to_dict()
    whole = LlavaNextConfig(text_config=text)
    raw = whole.to_dict() | {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "use_image_newline_parameter": True,
    }
    assert raw["vision_config"]["vocab_size"] == 32000
    kept = {"model_type", "text_config", "vision_config"}
    for given in (raw, {key: value for key, value in raw.items() if key in kept}):
        (tmp_path / "config.json").write_text(json.dumps(given))
        vision = read_hf_config(tmp_path)["vision"]
        assert vision["image_grid_pinpoints"] == whole.image_grid_pinpoints == [list(size) for size in PUBLISHED]
        assert vision["image_token_id"] == whole.image_token_id and vision["video_token_id"] is None
        assert (vision["vision_feature_layer"], vision["vision_feature_select_strategy"]) == (-2, "default")
        assert (vision["connector"], vision["vision_aspect_ratio"]) == ("onevision", "anyres")
        assert vision["tower_config"]["image_size"] == whole.vision_config.image_size == 336


def test_a_language_model_gets_such_eyes(rng, world, tmp_path):
    """What was built here comes out as this family, its sizes by name."""
    make_next(tmp_path / "model", "clip", rng)
    model = imported(tmp_path / "model", world)
    model.model_config.vision = eyes(image_grid_pinpoints=None, image_token_id=7)
    export_hf(model, tmp_path / "made")
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert made["model_type"] == "llava_next" and made["image_token_index"] == 7 and made["image_seq_length"] == 4
    assert len(made["image_grid_pinpoints"]) == 36 and "vision_aspect_ratio" not in made


def test_the_planner_counts_what_is_shown(rng):
    """Patches that the tower sees for each token, of images up to six times as long as high: at most as many as are planned."""
    places = places_of(eyes())
    assert places == 2 and places_of(eyes(vision_aspect_ratio="anyres_max_4")) == 4
    assert places_of(VisionConfig(tower_config=TOWERS["clip"])) == 1
    for short, ratio in torch.rand(200, 2, generator=rng, dtype=torch.float64).tolist():
        size = sorted((int(300 + 1000 * short), int((300 + 1000 * short) * (1 + 5 * ratio))), reverse=ratio > 0.5)
        tiling = plan_tiling(*size, PUBLISHED, 336, 24, math.inf)
        shown = 24**2 * (1 + tiling.rows * tiling.columns)
        assert 0.9 < shown / (24**2 + math.prod(tiling.grid)) <= places, size
