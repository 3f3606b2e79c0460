"""Tiles of an image of any size (anyres): how many tokens it has, and what they show, by transformers' own LLaVA-OneVision."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.hf.eyes import read_preprocessing
from megatron_ext.vision import VisionConfig
from megatron_ext.vision.connectors import _resized, build_connector
from megatron_ext.vision.preprocessing import Preprocessor
from megatron_ext.vision.tiling import plan_tiling, sizes_of
from tests.hf_folders import imported
from tests.vision_cases import ONEVISION, ONEVISION_SIDE, TOWERS, make_onevision

TOWER = TOWERS["siglip"] | {"image_size": ONEVISION_SIDE, "vision_use_head": False}
PREPROCESSING = {
    "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": ONEVISION_SIDE, "width": ONEVISION_SIDE},
    "image_grid_pinpoints": ONEVISION["image_grid_pinpoints"],
}  # fmt: skip


def onevision(**changes) -> VisionConfig:
    return VisionConfig(
        **{"tower_config": TOWER, "preprocessing": PREPROCESSING, "connector": "onevision"} | ONEVISION | changes
    )


@pytest.mark.parametrize(("side", "patches", "most"), [(384, 27, 9), (384, 27, 2), (336, 24, 5)])
def test_as_many_tokens_as_transformers_processor_writes(side, patches, most, rng):
    """200 sizes, thin ones among them; the published models' are the first case."""
    from transformers import LlavaOnevisionProcessor

    sizes = sizes_of(side)
    processor = SimpleNamespace(image_processor=SimpleNamespace(image_grid_pinpoints=sizes))
    processor.num_image_tokens, processor.vision_aspect_ratio = patches**2, f"anyres_max_{most}"
    processor._get_unpadded_features = partial(LlavaOnevisionProcessor._get_unpadded_features, processor)
    drawn = torch.empty(200, 2).uniform_(1.2, 8, generator=rng).exp().int().tolist()
    for height, width in drawn:
        expected = LlavaOnevisionProcessor._get_number_of_features(processor, height, width, side, side)
        try:
            rows, columns = plan_tiling(height, width, tuple(map(tuple, sizes)), side, patches, most).grid
        except UserError:  # no row of it is left, of which transformers shows the whole alone
            assert expected == patches**2 and patches % 2 == 0
            continue
        assert patches**2 + rows * columns == expected, (height, width)


def test_what_is_seen_of_an_image_of_any_size(rng, world, tmp_path):
    """Pictures bitwise those of transformers' processor, features those of its model."""
    from transformers import LlavaOnevisionImageProcessorPil

    theirs = make_onevision(tmp_path / "model", rng)
    model = imported(tmp_path / "model", world)
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(str(tmp_path / "model"))
    eyes = Preprocessor.of(model.model_config.vision)
    seen = set()
    drawn = torch.randint(4, 60, (12, 2), generator=rng).tolist()
    for height, width in [(12, 12), (40, 41), (9, 44), (44, 9), (400, 2), *drawn]:
        image = torch.randint(256, (1, 3, height, width), generator=rng, dtype=torch.uint8)
        found = eyes.pixels(image, alone=True)
        given = processor([[image[0].permute(1, 2, 0).numpy()]], input_data_format="channels_last", return_tensors="pt")
        assert torch.equal(found.values, given["pixel_values"][0])
        with torch.no_grad():
            (expected,) = theirs.get_image_features(**given).pooler_output
            features = model.media_projector(model.vision_tower([found]), [found])
        tiling = eyes.tiling(height, width)
        assert len(features) == 9 + tiling.grid[0] * tiling.grid[1] and features.shape == expected.shape
        assert (features - expected).abs().max() < 1e-4, (height, width)
        seen.add((tiling.rows, tiling.columns, tiling.kept == (tiling.height, tiling.width)))
    assert {(1, 1, True), (2, 2, False), (1, 3, True), (3, 1, True)} <= seen


def test_a_tile_is_one_of_its_tower(rng):
    """Images in company, and those of another preprocessing, are one tile; sizes must be the tower's."""
    image = torch.randint(256, (1, 3, 20, 40), generator=rng, dtype=torch.uint8)
    eyes = Preprocessor.of(onevision())
    assert eyes.pixels(image).tiling is None and eyes.pixels(image).patches == (1, 3, 3)
    assert eyes.pixels(image, alone=True).patches == (3, 3, 3) and eyes.tiling(20, 40).columns == 2
    plain = Preprocessor.of(onevision(preprocessing=PREPROCESSING | {"image_processor_type": "SiglipImageProcessor"}))
    assert plain.tiling(20, 40) is None and plain.pixels(image, alone=True).patches == (1, 3, 3)
    with pytest.raises(UserError, match="cuts images in other sizes .image_grid_pinpoints. than model.vision does"):
        Preprocessor.of(onevision(image_grid_pinpoints=[[12, 12]]))
    with pytest.raises(UserError, match="a picture of 1 x 900 pixels is too thin: cut into tiles it leaves 0 x 2"):
        plan_tiling(1, 900, ((8, 8), (8, 24)), 8, 2, 1)


def test_what_is_said_of_tiles():
    made = onevision(image_grid_pinpoints=None)
    assert made.image_grid_pinpoints == [[12 * i, 12 * j] for i in range(1, 7) for j in range(1, 7)]
    for changes, words in (
        ({"image_grid_pinpoints": [[12, 12], [12, 18]]}, r"image_grid_pinpoints=\[\[12, 18\]\]: .* multiples of the tower's 12"),
        ({"image_grid_pinpoints": []}, r"image_grid_pinpoints=\[\]: "),
        ({"image_grid_pinpoints": "(1x1)"}, "image_grid_pinpoints=.*: sizes that images are cut"),
        ({"image_grid_pinpoints": [12, 24]}, r"image_grid_pinpoints=\[12\]: sizes that images are cut"),
        ({"image_grid_pinpoints": 12}, r"image_grid_pinpoints=\[12\]: sizes that images are cut"),
        ({"vision_aspect_ratio": 9}, "vision_aspect_ratio=9 is neither anyres nor of the form anyres_max_9"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio=anyres_max_0 is neither anyres nor of the form"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            onevision(**changes)


def test_the_shape_of_published_models_is_transformers_default(tmp_path):
    """What a config.json leaves out is what transformers assumes."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil

    theirs = LlavaOnevisionConfig()
    assert sizes_of(384) == theirs.image_grid_pinpoints == LlavaOnevisionImageProcessorPil().image_grid_pinpoints
    assert VisionConfig.vision_aspect_ratio == theirs.vision_aspect_ratio
    assert read_preprocessing(tmp_path) == {"preprocessing": None, "video_preprocessing": None}


def test_an_image_in_tiles_has_gradients_to_all_of_them(rng):
    """Of random projections of what is kept, against autograd through `interpolate` itself."""
    vision = onevision()
    connector = build_connector(vision, 8, 0.5).double()
    image = torch.randint(256, (1, 3, 45, 43), generator=rng, dtype=torch.uint8)
    shown = Preprocessor.of(vision).pixels(image, alone=True)
    features = torch.randn(5 * 9, 24, dtype=torch.float64, generator=rng, requires_grad=True)
    found = connector(features, [shown])
    weights = torch.randn(found.shape, dtype=torch.float64, generator=rng)
    (ours,) = torch.autograd.grad((found * weights).sum(), features)
    tiling = shown.tiling
    projected = connector.linear_2(connector.act(connector.linear_1(features)))
    grid = projected[9:].view(2, 2, 3, 3, 8).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    grid = grid[:, tiling.top : 6 - tiling.top, tiling.left : 6 - tiling.left]
    small = torch.nn.functional.interpolate(grid[None], tiling.kept, mode="bilinear")[0]
    ends = connector.image_newline[:, None, None].expand(-1, tiling.kept[0], 1)
    expected = torch.cat([projected[:9], torch.cat([small, ends], 2).flatten(1).T])
    (theirs,) = torch.autograd.grad((expected * weights).sum(), features)
    assert tiling.kept != (tiling.height, tiling.width)
    assert (found - expected).abs().max() < 1e-10 and (ours - theirs).abs().max() < 1e-10


def test_interpolation_is_rounded_once(rng):
    """To bf16's nearest of what fp64 computes, or to the one beside it, where that is halfway."""
    for _ in range(20):
        t, h, w, height, width = (int(torch.randint(2, 30, (), generator=rng)) for _ in range(5))
        grid = torch.randn(t % 3 + 1, h, w, 8, generator=rng).bfloat16()
        places = grid.double().permute(0, 3, 1, 2)
        exact = torch.nn.functional.interpolate(places, (height, width), mode="bilinear").permute(0, 2, 3, 1)
        found = _resized(grid, height, width)
        assert found.dtype == torch.bfloat16
        error = (found.double() - exact).abs()
        assert (error <= exact.abs() * 2**-8 * 1.01 + 1e-6).all()
