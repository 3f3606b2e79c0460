"""Images and videos of rows as users have them: lists, content parts, frames as files, sizes and times of their own."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from megatron_ext.models.config import PositionEmbedding
from megatron_ext.models.media import pack_prompts
from megatron_ext.rotary import Text, Video
from megatron_ext.vision import VisionConfig
from recipes.data.clips import patchify
from recipes.data.errors import VideoError
from recipes.data.frames import probe, read_frames
from recipes.data.media_rows import with_folder
from recipes.data.rows import load_pairs, load_prompts
from recipes.data.video import VideoReader
from recipes.data.video_settings import VideoSettings, smart_size
from tests.gpt_cases import small_config
from tests.unit.recipes.data.clip_cases import write_clip
from tests.unit.recipes.data.media_row_cases import FIXED, OWN_SIZE, greys, media_of, prompts
from tests.vision_cases import (
    NEXT,
    QWEN3_VIDEO_PREPROCESSING,
    QWEN_PREPROCESSING,
    TOWERS,
    next_preprocessing,
    qwen_tower,
)

USER_PARTS = [
    {"type": "image_url", "image_url": {"url": "b.png"}}, {"type": "text", "text": " see "},
    {"type": "image", "image": "a.png"}, {"type": "video", "video": ["c.png", "d.png"]},
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "shown", "seen"),
    [
        ({"image": "a.png", "prompt": "see <image>"}, [(1, 2, 2)], [40]),
        ({"images": ["b.png", "a.png"], "prompt": "<image> and <image>see"}, [(1, 2, 2)] * 2, [90, 40]),
        (
            {"images": ["a.png"], "videos": ["clip.mp4", ["c.png", "d.png"]], "prompt": "<video>see<image><video>"},
            [(2, 2, 2), (1, 2, 2), (2, 2, 2)],
            [50, 40, 140],
        ),
        ({"video": ["d.png", "c.png", "b.png", "a.png"], "prompt": "<video>"}, [(2, 2, 2)], [140]),
        ({"messages": [{"role": "user", "content": USER_PARTS}]}, [(1, 2, 2)] * 2 + [(2, 2, 2)], [90, 40, 140]),
        (
            {
                "images": ["c.png", "d.png"],
                "messages": [
                    {"role": "user", "content": "see <image>"},
                    {"role": "assistant", "content": "yes"},
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which"}]},
                ],
            },
            [(1, 2, 2)] * 2,
            [140, 190],
        ),
        ({"images": [], "videos": None, "prompt": "see"}, [], []),
        ({"images": [{"path": "a.png", "bytes": None}], "prompt": "<image>"}, [(1, 2, 2)], [40]),
    ],
    ids=["image", "images", "both", "frames", "parts", "between turns", "none", "of a table"],
)
def test_a_row_shows_its_media_where_its_text_names_them(row, shown, seen, media, seeing, tmp_path):
    (prompt,) = prompts(media, seeing, FIXED, row)
    if not shown:
        assert prompt.for_model() == prompt.tokens
        return
    assert [(v.t, v.h, v.w) for v in media_of(prompt)] == shown
    assert greys(prompt) == pytest.approx(seen, abs=6)
    assert sum(token in prompt.placeholders for token in prompt.tokens) == sum(math.prod(s) for s in shown)
    (moved,) = prompts(tmp_path, seeing, FIXED, with_folder(prompt.row, media))
    assert moved.tokens == prompt.tokens and greys(moved) == greys(prompt)


def test_a_family_writes_its_own_tokens_around_media(media, seeing):
    """<image> and <video> become what the family writes; what a row has written itself stays."""
    how = VideoSettings(
        num_frames=2, height=16, width=16, image_placeholder="<|image_pad|>", image_text="<|see|><|image_pad|><|end|>"
    )
    row = {"images": ["a.png", "b.png", "c.png"], "video": "clip.mp4"}
    text = "see <image> and <video> <|see|><|image_pad|><|end|> of <|image_pad|>"
    (prompt,) = prompts(media, seeing, how, row | {"prompt": text})
    tokens = {name: seeing.token_id(name, "x") for name in ("<video>", "<|image_pad|>", "<|see|>", "<|end|>")}
    counts = {name: prompt.tokens.count(token) for name, token in tokens.items()}
    assert counts == {"<video>": 8, "<|image_pad|>": 12, "<|see|>": 2, "<|end|>": 2}
    assert greys(prompt) == pytest.approx([40, 50, 90, 140], abs=6)
    assert [type(item) for item in prompt.for_model().items] == [Text, Video, Text, Video, Text, Video, Text, Video]


def test_frames_stand_apart_with_their_seconds_where_the_family_writes_them(media, seeing):
    """Qwen3-VL's way: <t seconds> and the frame, the mean of when those of a token come, and so for each."""
    how = VideoSettings(
        num_frames=4, frames_per_patch=2, height=16, width=16, timestamps="<{seconds:.1f} seconds>",
        video_text="<|see|><video><|end|>",
    )  # fmt: skip
    (prompt,) = prompts(media, seeing, how, {"video": "clip.mp4", "prompt": "see <video>which"})
    one_each = [
        t
        for t, before in zip(prompt.tokens, [-1, *prompt.tokens], strict=False)
        if t != before or t not in prompt.placeholders
    ]
    # 2.5 seconds: pictures 2, 7, 12 and 17 of 20, which come at 0.25, 0.875, 1.5 and 2.125.
    assert (
        seeing.decode_whole(one_each) == "see <0.6 seconds><|see|><video><|end|><1.8 seconds><|see|><video><|end|>which"
    )
    assert media_of(prompt) == [Video(1, 2, 2)] * 2
    expected = patchify(read_frames(media / "clip.mp4", 4, 16, 16), 8, 2)
    assert torch.equal(prompt.for_model().content, expected)


def test_a_tower_sees_at_once_what_stands_apart(media, seeing, caplog):
    """Qwen3-VL's: of a film one grid of patches, and a medium for each moment in the text. Without timestamps it is said, and
    without what its videos are bounded by."""
    eyes = VisionConfig(tower_config=qwen_tower("qwen3_vl"), preprocessing=QWEN_PREPROCESSING)
    model = small_config(vision=eyes, position_embedding=PositionEmbedding("qwen3_vl"))
    VideoReader.of(VideoSettings(num_frames=4), model)
    assert "data.video.timestamps is not set: frames follow each other" in caplog.text
    assert "model.vision.video_preprocessing is null: each frame of a video may have as many pixels" in caplog.text
    caplog.clear()
    model.vision.video_preprocessing = QWEN3_VIDEO_PREPROCESSING
    how = VideoSettings(num_frames=4, timestamps="<{seconds:.1f} seconds>")
    reader = VideoReader.of(how, model)
    assert not caplog.text
    rows = media / "rows.jsonl"
    rows.write_text(json.dumps({"video": "clip.mp4", "image": "wide.png", "prompt": "see <video>and<image>which"}))
    (prompt,) = load_prompts(rows, seeing, 2000, reader)
    shown = prompt.for_model()
    grids = [reader.eyes.patches(4, 32, 48, video=True), reader.eyes.patches(1, 16, 64)]
    assert [pixels.patches for pixels in shown.content] == grids and grids[0][0] == 2
    film, still = ((1, h // 2, w // 2) for _, h, w in grids)
    assert media_of(prompt) == [Video(*film), Video(*film), Video(*still)]
    assert [type(item) for item in shown.items] == [Text, Video] * 3 + [Text]


def test_a_token_stands_behind_what_llava_onevision_sees(media, seeing, caplog):
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 8, "width": 8}}
    eyes = VisionConfig(tower_config={**TOWERS["siglip"]}, preprocessing=processor, connector="onevision")
    reader = VideoReader.of(VideoSettings(num_frames=3), small_config(vision=eyes))
    assert "every image is seen as one tile" in caplog.text
    rows = media / "rows.jsonl"
    rows.write_text(json.dumps({"video": "clip.mp4", "image": "wide.png", "prompt": "see <video>and<image>which"}))
    (prompt,) = load_prompts(rows, seeing, 2000, reader)
    assert [(v.t, v.h, v.w) for v in media_of(prompt)] == [(3, 1, 1), (1, 1, 1), (1, 2, 2), (1, 1, 1)]
    shown = prompt.for_model()
    assert [(p.video, p.patches) for p in shown.content] == [(True, (3, 2, 2)), (False, (1, 2, 2))]
    assert [type(item) for item in shown.items] == [Text, Video, Video, Text, Video, Video, Text]


def test_an_image_alone_in_its_row_is_seen_in_tiles(media, seeing, caplog):
    """Whatever stands beside it that is no image; several are one tile each."""
    processor = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 8, "width": 8}}
    sizes = [[8, 8], [8, 16], [16, 16]]
    eyes = VisionConfig(
        tower_config={**TOWERS["siglip"]}, preprocessing=processor | {"image_grid_pinpoints": sizes}, connector="onevision",
        image_grid_pinpoints=sizes,
    )  # fmt: skip
    reader = VideoReader.of(VideoSettings(num_frames=3), small_config(vision=eyes))
    assert not caplog.text
    rows = media / "rows.jsonl"
    several = {"images": ["wide.png", "a.png"], "prompt": "<image>and<image>which"}
    alone = {"video": "clip.mp4", "image": "wide.png", "prompt": "see <video>and<image>which"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in (several, alone)))
    first, second = load_prompts(rows, seeing, 2000, reader)
    assert media_of(first) == [Video(1, 2, 2), Video(1, 1, 1)] * 2
    assert [pixels.patches for pixels in first.for_model().content] == [(1, 2, 2)] * 2
    film, image = second.for_model().content
    # 16 x 64 pixels become 4 x 16, one row of patches of two tiles, between bars; a token ends it.
    assert media_of(second)[2:] == [Video(1, 2, 2), Video(1, 2, 5)] and image.patches == (3, 2, 2)
    assert image.tiling == reader.eyes.tiling(16, 64) and not image.video and film.tiling is None


def test_every_image_is_seen_in_tiles_and_no_video(media, seeing, caplog):
    """As many tokens, in the same places, as the processor of LLaVA-1.6 writes for several images in one text."""
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    said = next_preprocessing("clip")
    eyes = VisionConfig(tower_config=TOWERS["clip"], preprocessing=said, connector="onevision", **NEXT)
    reader = VideoReader.of(VideoSettings(num_frames=3, placeholder="<|image_pad|>"), small_config(vision=eyes))
    assert not caplog.text
    rows = media / "rows.jsonl"
    names, text = ["wide.png", "a.png"], "see {0} and {0}which"
    rows.write_text(json.dumps({"images": names, "prompt": text.format("<image>")}))
    (prompt,) = load_prompts(rows, seeing, 2000, reader)
    assert [pixels.patches for pixels in prompt.for_model().content] == [(4, 2, 2), (5, 2, 2)]
    assert media_of(prompt) == [Video(1, 2, 2), Video(1, 2, 7), Video(1, 2, 2), Video(1, 4, 5)]
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(**{k: v for k, v in said.items() if not k.endswith("_type")}),
        seeing._tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<|image_pad|>",
        num_additional_image_tokens=1,
    )
    given = processor([Picture.open(media / name) for name in names], text.format("<|image_pad|>"))
    assert list(prompt.tokens) == given["input_ids"][0]
    for video in ("clip.mp4", ["a.png", "b.png"]):
        rows.write_text(json.dumps({"video": video, "prompt": "see <video>"}))
        words = (
            "^.*rows.jsonl:1: .*: a video, and a model with model.vision.vision_aspect_ratio=anyres sees images alone"
        )
        with pytest.raises(VideoError, match=words):
            load_prompts(rows, seeing, 2000, reader)


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ({"fps": 2}, 5),
        ({"fps": 2, "frames_per_patch": 2}, 4),
        ({"fps": 0.4}, 4),
        ({"fps": 0.4, "fps_min_frames": 1}, 1),
        ({"fps": 100}, 20),
        ({"fps": 100, "fps_max_frames": 7}, 7),
        ({}, 8),
    ],
)
def test_frames_by_the_second(how, count, media, seeing):
    """2.5 seconds of 20 pictures: as many as fps says, within bounds, not more than there are; and when each is shown."""
    settings = VideoSettings(height=16, width=16, **how)
    (prompt,) = prompts(media, seeing, settings, {"video": "clip.mp4", "prompt": "<video>"}, timed=True)
    (found,) = media_of(prompt)
    each = settings.frames_per_patch
    assert found.t == count // each
    moments = [(i + 0.5) * 2.5 / count for i in range(count)]
    middles = [sum(moments[i : i + each]) / each for i in range(0, count, each)]
    assert found.seconds == pytest.approx(middles, abs=1e-3)
    expected = patchify(read_frames(media / "clip.mp4", count, 16, 16), 8, each)
    assert torch.equal(prompt.for_model().content, expected)


def test_sizes_of_their_own_stand_beside_each_other_in_one_batch(media, seeing):
    rows = [
        {"images": ["wide.png", "a.png"], "prompt": "<image><image>see"},
        {"video": "tall.mp4", "prompt": "see <video>"},
        {"prompt": "see"},
    ]
    found = prompts(media, seeing, OWN_SIZE, *rows)
    shapes = [[(v.t, v.h, v.w) for v in media_of(prompt)] for prompt in found[:2]]
    assert shapes == [[(1, 2, 8), (1, 2, 2)], [(2, 4, 2)]]  # 64 x 32 pixels are more than 512, a quarter of them is not
    batch = pack_prompts([p.for_model() for p in found], [[(1, 2)], [(3,)], [(4,)]], "vrope", 16)
    assert len(batch.media.rows) == 16 + 4 + 16
    assert torch.equal(batch.media.content, torch.cat([p.for_model().content for p in found[:2]]))


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)).filter(lambda size: max(size) <= 200 * min(size)),
    st.sampled_from([8, 28, 32]),
    st.integers(1, 60),
    st.integers(60, 4000),
)
def test_sizes_are_those_of_transformers(size, factor, fewest, most):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    bounds = fewest * factor**2, most * factor**2
    assert smart_size(*size, factor, *bounds) == smart_resize(*size, factor, *bounds)


def test_how_a_film_is_shown(media, tmp_path):
    """Its size with pixels that are not square, its time, its pictures."""
    found = probe(media / "clip.mp4")
    assert (found.height, found.width, found.pictures) == (32, 48, 20) and found.seconds == pytest.approx(2.5)
    write_clip(tmp_path / "narrow.mp4", 3, size=(32, 48), pixel=Fraction(4, 3))
    assert (probe(tmp_path / "narrow.mp4").height, probe(tmp_path / "narrow.mp4").width) == (32, 64)
    exif = Picture.Exif()
    exif[0x0112] = 6  # a quarter turn
    Picture.fromarray(np.zeros((16, 40, 3), dtype=np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert probe(tmp_path / "turned.jpg").height == 40 and probe(tmp_path / "turned.jpg").width == 16


def test_a_run_that_said_nothing_goes_on_as_the_numbers_that_held():
    """What is kept beside a run says every key."""
    plain = VideoSettings()
    assert (plain.num_frames, plain.height, plain.width) == (8, 32, 32)
    assert VideoSettings(**dataclasses.asdict(plain)) == plain
    by_time = VideoSettings(fps=2, max_pixels=1024)
    assert (by_time.num_frames, by_time.height, by_time.width) == (None, None, None)
    assert VideoSettings(**dataclasses.asdict(by_time)) == by_time


def test_pairs_learn_from_rows_with_images(media, seeing):
    row = {"images": ["a.png", "b.png"], "prompt": "see <image> and <image>", "response": "yes"}
    (pair,) = prompts(media, seeing, FIXED, row, load=load_pairs)
    assert media_of(pair.prompt) == [Video(1, 2, 2)] * 2 and [clip.kind for clip in pair.media] == ["image"] * 2
