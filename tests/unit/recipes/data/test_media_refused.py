"""Rows and settings of media that cannot be, each refused in one line."""

from __future__ import annotations

import pytest

from recipes.data.errors import VideoError
from recipes.data.video_settings import VideoSettings
from tests.unit.recipes.data.media_row_cases import FIXED, picture, prompts


def test_a_broken_clip_is_found_when_it_is_used_or_before_the_run(media, seeing):
    row = {"video": "broken.mp4", "prompt": "<video>"}
    good = {"video": "clip.mp4", "prompt": "<video>"}
    loaded = prompts(media, seeing, FIXED, good, row)
    with pytest.raises(VideoError, match=r"^\S*rows.jsonl:2: .*broken.mp4") as at_use:
        loaded[1].for_model()
    checked = VideoSettings(num_frames=2, height=16, width=16, check=True)
    with pytest.raises(VideoError, match=r"^\S*rows.jsonl:2: .*broken.mp4") as at_load:
        prompts(media, seeing, checked, good, row)
    assert str(at_use.value) == str(at_load.value) and "\n" not in str(at_load.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"images": ["a.png"], "prompt": "see"}, "the text has 0 image placeholders, the row has 1 images"),
        ({"images": ["a.png"], "prompt": "<image><image>"}, "the text has 2 image placeholders, the row has 1 images"),
        ({"images": ["a.png"], "prompt": "<video>"}, "the text has 0 image placeholders, the row has 1 images"),
        ({"image": "a.png", "images": ["b.png"], "prompt": "<image>"}, "both image and images"),
        ({"images": "a.png", "prompt": "<image>"}, "images must be a list of files"),
        ({"images": [3], "prompt": "<image>"}, r"images\[0\] must be the name of a file, got 3"),
        ({"videos": [[]], "prompt": "<video>"}, r"videos\[0\] must be the name of a file, or a list of its frames"),
        ({"images": ["https://x.org/a.png"], "prompt": "<image>"}, r"images\[0\] .*a.png is no file here: download it"),
        ({"images": ["none.png"], "prompt": "<image>"}, r"images\[0\] .*none.png does not exist"),
        (
            {"video": {"frames": ["a.png"], "fps": 0}, "prompt": "<video>"},
            "fps of video must be a number above 0, got 0",
        ),
        (
            {"video": {"frames": ["a.png", "b.png"], "times": [1, 1]}, "prompt": "<video>"},
            "times of video must be ascending seconds, one of each of its 2 frames",
        ),
        (
            {"video": {"frames": ["a.png"], "times": [1, 2]}, "prompt": "<video>"},
            "times of video must be ascending seconds, one of each of its 1 frames",
        ),
        (
            {"video": {"frames": ["a.png"], "times": [1], "fps": 2}, "prompt": "<video>"},
            "video must have frames, a list of files, and fps or times beside them",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "clip.mp4", "fps": 2}]}]},
            r"nothing reads fps of messages\[0\].content\[0\]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": 3}]}]},
            r"nothing reads max_pixels of messages\[0\].content\[0\]",
        ),
        (
            {"images": ["b.png"], "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
            r"both images\[0\] and messages\[0\].content\[0\] name a file",
        ),
        (
            {"images": ["thin.png"], "prompt": "<image>"},
            "thin.png: its picture of 1 x 300 pixels is more than 200 times",
        ),
        ({"images": ["large.png"], "prompt": "<image>"}, "300 x 300 pixels, more than data.video.largest_pixels=65536"),
    ],
)
def test_rows_whose_media_cannot_be_are_one_line(row, words, media, seeing):
    picture(media / "thin.png", 1, 300)
    picture(media / "large.png", 300, 300)
    how = VideoSettings(num_frames=2, max_pixels=1024, largest_pixels=65536)
    with pytest.raises(VideoError, match=rf"^\S*rows.jsonl:1: .*{words}") as caught:
        prompts(media, seeing, how, row)
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_too_large_is_refused_when_nothing_else_opens_it(media, seeing):
    picture(media / "large.png", 300, 300)
    how = VideoSettings(num_frames=2, height=16, width=16, largest_pixels=65536)
    (prompt,) = prompts(media, seeing, how, {"images": ["large.png"], "prompt": "<image>"})
    with pytest.raises(VideoError, match="rows.jsonl:1: .*large.png has a picture of 300 x 300 pixels, more than"):
        prompt.for_model()


def test_seconds_of_a_list_of_frames_must_be_said(media, seeing):
    how = VideoSettings(num_frames=2, height=16, width=16, timestamps="<{seconds:.1f}>")
    with pytest.raises(VideoError, match="rows.jsonl:1: data.video.timestamps .* video does not say of its frames"):
        prompts(media, seeing, how, {"video": ["a.png", "b.png"], "prompt": "<video>"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_frames": 8, "fps": 2}, "data.video.num_frames=8 and data.video.fps=2 are both set"),
        ({"fps": 0}, "data.video.fps=0 must be above 0"),
        (
            {"fps": 2, "fps_min_frames": 9, "fps_max_frames": 8},
            "fps_min_frames=9 is more than data.video.fps_max_frames=8",
        ),
        ({"max_pixels": 1024, "height": 32}, "data.video.height=32 and data.video.max_pixels=1024 are both set"),
        ({"max_pixels": 63}, "data.video.max_pixels=63 must be at least 64: one token shows 8 x 8 pixels"),
        ({"max_pixels": 64, "min_pixels": 128}, "data.video.max_pixels=64 must be at least 128"),
        ({"video_max_pixels": 64}, "data.video.video_max_pixels is set and data.video.max_pixels is not"),
        (
            {"height": 24, "merge_size": 2},
            "height=24 is not divisible by data.video.patch_size=8 x data.video.merge_size=2",
        ),
        ({"video_text": "<|see|>"}, "video_text='<|see|>' must have the placeholder '<video>' in it once"),
        ({"timestamps": "{minutes}"}, "timestamps='{minutes}' must be a text with {seconds} in it"),
        ({"workers": -1}, "data.video.workers=-1 must be at least 0"),
    ],
)
def test_settings_that_contradict_each_other(fields, words):
    with pytest.raises(ValueError) as caught:
        VideoSettings(**fields)
    assert words in str(caught.value)
