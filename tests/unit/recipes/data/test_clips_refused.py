"""Files that are no videos, rows that name nothing usable and settings without meaning, each in one line."""

from __future__ import annotations

import av
import numpy as np
import pytest

from recipes.data.clips import Clip
from recipes.data.errors import DataError, VideoError
from recipes.data.frames import read_frames
from recipes.data.rows import load_prompts
from recipes.data.video import VideoReader
from recipes.data.video_settings import VideoSettings
from tests.unit.recipes.data.clip_cases import SETTINGS, opened, write_clip


def truncated(folder):
    write_clip(folder / "whole.mp4", 40, "mpeg4")
    whole = (folder / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return "cut.mp4"


def sound(folder):
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return "sound.mp4"


def noise(folder):
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    return "noise.mp4"


def empty(folder):
    (folder / "empty.webm").write_bytes(b"")
    return "empty.webm"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, "cannot decode .*cut.mp4: .*it must be a video that FFmpeg reads"),
        (sound, "sound.mp4 has no video stream"),
        (noise, "cannot decode .*noise.mp4"),
        (empty, "cannot decode .*empty.webm"),
    ],
)
def test_files_that_are_no_videos(make, words, tmp_path):
    clip = Clip(str(tmp_path / make(tmp_path)), SETTINGS.grid, SETTINGS, "rows.jsonl:7")
    with pytest.raises(VideoError, match=f"^rows.jsonl:7: .*{words}") as caught:
        clip.features()
    assert "\n" not in str(caught.value)


def test_a_clip_that_ends_early(tmp_path):
    """Its table promises frames that are not there."""
    truncated(tmp_path)
    whole = (tmp_path / "whole.mp4").read_bytes()
    # The table stands at the end: keep it, and overwrite the second half of the pictures.
    place = whole.index(b"moov") - 4
    broken = whole[: place // 3] + bytes(place - place // 3) + whole[place:]
    (tmp_path / "broken.mp4").write_bytes(broken)
    with pytest.raises(VideoError, match="broken.mp4 is cut short|cannot decode .*broken.mp4"):
        read_frames(tmp_path / "broken.mp4", 40, 16, 16)


def test_a_download_that_stopped(tmp_path):
    """A .webm can be read as far as it goes; its header says how long it should be."""
    write_clip(tmp_path / "whole.webm", 40, "libvpx-vp9")
    whole = (tmp_path / "whole.webm").read_bytes()
    assert read_frames(tmp_path / "whole.webm", 4, 16, 16).shape == (4, 3, 16, 16)
    (tmp_path / "part.webm").write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(VideoError, match=r"part.webm is cut short: \d+ of 40 frames can be decoded"):
        read_frames(tmp_path / "part.webm", 4, 16, 16)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"video": "none.mp4"}, "video .*none.mp4 does not exist"),
        ({"video": 3}, "video must be the name of a file, got 3"),
        ({"video": "~nosuch/x"}, "video ~nosuch/x is no usable file name: Could not determine home directory"),
        ({"features": "x" * 300 + ".npy"}, r"features x{77}\.\.\. is no usable file name: File name too long$"),
        ({"video": "a", "features": "b"}, "both video and features"),
        ({"features": "wide.npy"}, "wide.npy has 5 features per token, model.vision.feature_size is 10"),
        ({"features": "flat.npy"}, r"flat.npy holds torch.float32 \(3, 4\), expected floats \[t, h, w, f\]"),
        ({"features": "noise.npy"}, "cannot read features .*noise.npy"),
        ({"features": "text.txt"}, "features are a .npy or a .safetensors file"),
        ({"video": "clip.mp4"}, "data.video makes 192 numbers of a token .* model.vision.feature_size is 10"),
    ],
)
def test_rows_that_name_nothing_usable(row, words, tmp_path, clip):
    np.save(tmp_path / "wide.npy", np.zeros((1, 2, 2, 5), dtype=np.float32))
    np.save(tmp_path / "flat.npy", np.zeros((3, 4), dtype=np.float32))
    (tmp_path / "noise.npy").write_bytes(b"not numpy")
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(VideoError, match=f"rows.jsonl:1: .*{words}"):
        opened(row, tmp_path, 10)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"video": "clip.mp4", "prompt": "no place"}', "has 0 video placeholders, the row has 1 videos"),
        ('{"prompt": "a <video> without a file"}', "has 1 video placeholders, the row has 0 videos"),
    ],
)
def test_placeholders_and_files_belong_together(row, words, tmp_path, clip, seeing):
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    with pytest.raises(VideoError, match=f"rows.jsonl:1: .*{words}"):
        load_prompts(tmp_path / "rows.jsonl", seeing, 100, VideoReader(SETTINGS, SETTINGS.feature_size))


def test_a_video_needs_its_settings_and_its_token(tmp_path, clip, seeing):
    (tmp_path / "rows.jsonl").write_text('{"video": "clip.mp4", "prompt": "<video>"}\n')
    with pytest.raises(DataError, match="rows.jsonl:1: the row has a video, but data.video is not set"):
        load_prompts(tmp_path / "rows.jsonl", seeing, 100)
    other = VideoReader(VideoSettings(placeholder="<film>"), 192)
    with pytest.raises(DataError, match="no token '<film>' .data.video.placeholder."):
        load_prompts(tmp_path / "rows.jsonl", seeing, 100, other)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_frames": 0}, "data.video.num_frames=0 must be at least 1"),
        ({"height": 30}, "data.video.height=30 is not divisible by data.video.patch_size=8"),
        ({"num_frames": 5, "frames_per_patch": 2}, "num_frames=5 is not divisible by data.video.frames_per_patch=2"),
    ],
)
def test_settings_without_meaning(fields, words):
    with pytest.raises(ValueError, match=words):
        VideoSettings(**fields)
