"""Real clips in: made with PyAV, decoded, sampled, cut into patches; and every file that cannot be used, in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import struct
import sys

import av
import numpy as np
import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.rotary import Text, Video
from recipes.data import video
from recipes.data.errors import DataError, VideoError
from recipes.data.frames import read_frames, sample_frames
from recipes.data.rows import load_pairs, load_prompts
from recipes.data.tokenizer import load_tokenizer
from recipes.data.video import (
    Clip,
    VideoReader,
    VideoSettings,
    open_clip,
    patchify,
)

SETTINGS = VideoSettings(num_frames=4, height=16, width=24, patch_size=8)


def write_clip(path, frames: int, codec: str = "libx264", size=(48, 64)) -> None:
    """Frame i is grey of 10 i, modulo 256."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.full((*size, 3), 10 * i % 256, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """With a <video> token, as tools/make_video_problems.py makes it."""
    from tools.make_word_problems import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, ["see no clip well a without a file yes user: assistant: <\n"], 300, special=("<video>",))
    return load_tokenizer(folder)


@pytest.fixture
def clip(tmp_path):
    write_clip(tmp_path / "clip.mp4", 20)
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("b.mp4", "mpeg4"), ("c.webm", "libvpx-vp9")])
def test_frames_are_those_of_the_middle_of_equal_stretches(name, codec, tmp_path):
    write_clip(tmp_path / name, 20, codec)
    frames = read_frames(tmp_path / name, 4, 24, 32)
    assert frames.shape == (4, 3, 24, 32) and frames.dtype == torch.uint8
    assert sample_frames(20, 4) == [2, 7, 12, 17]
    greys = frames.float().mean((1, 2, 3))
    assert (greys - torch.tensor([20.0, 70, 120, 170])).abs().max() <= 6  # the codec's loss


def test_a_short_clip_shows_some_frames_twice(tmp_path):
    write_clip(tmp_path / "short.mp4", 2)
    frames = read_frames(tmp_path / "short.mp4", 4, 16, 16)
    assert torch.equal(frames[0], frames[1]) and torch.equal(frames[2], frames[3])
    assert not torch.equal(frames[1], frames[2])


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((20, 30, 3), 200, dtype=np.uint8)).save(tmp_path / "picture.png")
    frames = read_frames(tmp_path / "picture.png", 1, 16, 16)
    assert frames.shape == (1, 3, 16, 16) and float(frames.float().mean()) == pytest.approx(200, abs=2)


@pytest.mark.parametrize("frames_per_patch", [1, 2])
def test_patches_hold_their_own_pixels(frames_per_patch, rng):
    frames = torch.randint(256, (4, 3, 16, 24), generator=rng, dtype=torch.uint8)
    tokens = patchify(frames, 8, frames_per_patch)
    assert tokens.shape == (4 // frames_per_patch * 2 * 3, frames_per_patch * 3 * 64)
    number = 0
    for t in range(0, 4, frames_per_patch):
        for h in range(2):
            for w in range(3):
                pixels = frames[t : t + frames_per_patch, :, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
                assert torch.equal(tokens[number], pixels.transpose(0, 1).flatten().float() / 127.5 - 1)
                number += 1


def test_rows_become_prompts_with_media(clip, tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text(
        '{"video": "clip.mp4", "prompt": "see <video>well"}\n{"prompt": "no clip"}\n', encoding="utf-8"
    )
    reader = VideoReader(SETTINGS, SETTINGS.feature_size)
    seen, blind = load_prompts(tmp_path / "rows.jsonl", tokenizer, 100, reader)
    assert seen.tokens.count(seen.placeholder) == SETTINGS.grid.length == 4 * 2 * 3
    prompt = seen.for_model()
    before, after = (len(tokenizer.encode(text)) for text in ("see ", "well"))
    assert prompt.items == (Text(before), Video(4, 2, 3), Text(after))
    expected = patchify(read_frames(clip, 4, 16, 24), 8)
    assert torch.equal(prompt.features, expected)
    assert blind.for_model() == blind.tokens and blind.clip is None
    assert pickle.loads(pickle.dumps(seen)) == seen, "ranks exchange prompts"


def test_rows_become_pairs_with_media(clip, tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"video": "clip.mp4", "prompt": "<video>", "response": "yes"}\n')
    (pair,) = load_pairs(tmp_path / "rows.jsonl", tokenizer, 100, VideoReader(SETTINGS, SETTINGS.feature_size))
    assert pair.prompt.for_model().items == (Video(4, 2, 3),)


@pytest.mark.parametrize(
    "row",
    [
        {"video": "clip.mp4", "prompt": "see <video>", "response": " <video>"},
        {"prompt": "see", "response": " <video>"},
        {"features": "clip.npy", "prompt": "see", "response": "<video>yes"},
    ],
)
def test_a_video_is_not_learnt(clip, tmp_path, tokenizer, row):
    np.save(tmp_path / "clip.npy", np.zeros((1, 1, 1, SETTINGS.feature_size), np.float32))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        UserError, match="rows.jsonl:1: (a video's placeholder stands in the response|the text has 0 video)"
    ):
        load_pairs(tmp_path / "rows.jsonl", tokenizer, 100, VideoReader(SETTINGS, SETTINGS.feature_size))


def test_all_turns_are_learnt_behind_a_video(clip, tmp_path, tokenizer):
    """In the first question it is part of the prompt; in a later one it would be among what is learnt."""
    folder = tmp_path / "chat"
    tokenizer.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    questions = [{"role": "user", "content": text} for text in ("<video>see well", "no clip")]
    answer = {"role": "assistant", "content": "yes"}
    talk = [questions[0], answer, questions[1], answer]
    path, reader = tmp_path / "rows.jsonl", VideoReader(SETTINGS, SETTINGS.feature_size)
    path.write_text(json.dumps({"video": "clip.mp4", "messages": talk}) + "\n")
    (pair,) = load_pairs(path, load_tokenizer(folder), 200, reader, all_turns=True)
    assert pair.prompt.tokens.count(pair.prompt.placeholder) == SETTINGS.grid.length
    assert not all(pair.learnt) and tokenizer.decode(pair.response) == "yes\nuser:no clip\nassistant:yes\n"
    assert tokenizer.decode([t for t, it in zip(pair.response, pair.learnt, strict=True) if it]) == "yes\nyes\n"
    swapped = [{**questions[0], "content": "no clip"}, answer, {**questions[1], "content": "<video>see well"}, answer]
    path.write_text(json.dumps({"video": "clip.mp4", "messages": swapped}) + "\n")
    assert load_pairs(path, load_tokenizer(folder), 200, reader)
    with pytest.raises(UserError, match="rows.jsonl:1: the text has 0 video placeholders"):
        load_pairs(path, load_tokenizer(folder), 200, reader, all_turns=True)


def test_conversations_with_a_video(clip, tmp_path, tokenizer):
    """The shape of the field's VLM trainers: a clip, and messages that say where it stands."""
    folder = tmp_path / "chat"
    tokenizer.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    row = {"video": "clip.mp4", "messages": [{"role": "u", "content": "<video>see well"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    chat = load_tokenizer(folder)
    (prompt,) = load_prompts(tmp_path / "rows.jsonl", chat, 100, VideoReader(SETTINGS, SETTINGS.feature_size))
    before, after = (len(chat.encode(text)) for text in ("u: ", "see well\na: "))
    assert prompt.for_model().items == (Text(before), Video(4, 2, 3), Text(after))


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_precomputed_features(suffix, tmp_path, rng):
    from safetensors.torch import save_file

    features = torch.randn(2, 3, 4, 10, generator=rng)
    path = tmp_path / f"features{suffix}"
    np.save(path, features.numpy()) if suffix == ".npy" else save_file({"features": features}, path)
    found = open_clip({"features": path.name}, tmp_path, SETTINGS, 10, "rows.jsonl:1")
    assert found.grid == Video(2, 3, 4) and torch.equal(found.features(), features.flatten(0, 2))


def large(path, shape=(16, 16, 1024, 1024)) -> None:
    """A sparse file with 1 GiB of zeros for features."""
    size = 4 * math.prod(shape)
    with open(path, "wb") as file:
        if path.suffix == ".npy":
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        else:
            header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
            file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + size)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_opening_features_reads_their_shape_only(suffix, tmp_path):
    from tools.bench_common import PeakMemory

    large(tmp_path / f"large{suffix}")
    with PeakMemory(torch.device("cpu")) as peak:
        found = open_clip({"features": f"large{suffix}"}, tmp_path, SETTINGS, 1024, "rows.jsonl:1")
    assert found.grid == Video(16, 16, 1024) and peak.growth < 1 << 28


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_features_that_end_early(suffix, tmp_path):
    path = tmp_path / f"cut{suffix}"
    large(path, (2, 2, 2, 4))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VideoError, match=f"rows.jsonl:1: cannot read features .*cut{suffix}: "):
        open_clip({"features": path.name}, tmp_path, SETTINGS, 4, "rows.jsonl:1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_become_fp32(dtype, tmp_path, rng):
    from safetensors.torch import save_file

    features = torch.randn(1, 2, 2, 5, generator=rng).to(dtype)
    save_file({"features": features}, tmp_path / "f.safetensors")
    found = open_clip({"features": "f.safetensors"}, tmp_path, SETTINGS, 5, "rows.jsonl:1").features()
    assert found.dtype == torch.float32 and torch.equal(found, features.flatten(0, 2).float())


def test_what_was_read_last_is_kept_up_to_a_number_of_bytes(clip, monkeypatch):
    """A row's frames are decoded once, for all rows that name the file; what was not used for longest goes first."""
    small, wide = SETTINGS, dataclasses.replace(SETTINGS, width=48)
    small_and_wide = sum(how.num_frames * 3 * how.height * how.width for how in (small, wide))  # uint8
    recent = video._Recent(small_and_wide)
    monkeypatch.setattr(video, "_recent", recent)
    opened = []
    monkeypatch.setattr(video, "read_frames", lambda *given: opened.append(given[3]) or read_frames(*given))

    def look(how, line=1):
        found = Clip(str(clip), how.grid, how, f"rows.jsonl:{line}").features()
        assert torch.equal(found, patchify(read_frames(clip, 4, how.height, how.width), how.patch_size))
        assert recent.size == sum(x.nbytes for x in recent.kept.values()) <= small_and_wide

    look(small)
    look(wide)
    look(small, line=2)
    assert opened == [24, 48]
    look(dataclasses.replace(SETTINGS, width=8))  # one too many: the wide one goes
    look(small)
    assert opened == [24, 48, 8]
    look(wide)
    assert opened == [24, 48, 8, 48]
    look(dataclasses.replace(SETTINGS, width=96))  # larger than all together: not kept
    assert [key[1].width for key in recent.kept] == [24, 48]


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


@pytest.mark.parametrize("name", ["talk.mp4", "talk.mkv"])
def test_sound_may_be_longer_than_the_picture(name, tmp_path):
    with av.open(str(tmp_path / name), "w") as container:
        picture, sound = container.add_stream("libx264", rate=8), container.add_stream("aac", rate=16000, layout="mono")
        picture.width = picture.height = 32
        picture.pix_fmt = "yuv420p"
        for _ in range(20):  # 2.5 seconds
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8), format="rgb24")
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        for number in range(80):  # 5 seconds
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, 1024 * number
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    assert read_frames(tmp_path / name, 20, 16, 16).shape == (20, 3, 16, 16)


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
        open_clip(row, tmp_path, SETTINGS, 10, "rows.jsonl:1")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"video": "clip.mp4", "prompt": "no place"}', "has 0 video placeholders, the row has 1 videos"),
        ('{"prompt": "a <video> without a file"}', "has 1 video placeholders, the row has 0 videos"),
    ],
)
def test_placeholders_and_files_belong_together(row, words, tmp_path, clip, tokenizer):
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    with pytest.raises(VideoError, match=f"rows.jsonl:1: .*{words}"):
        load_prompts(tmp_path / "rows.jsonl", tokenizer, 100, VideoReader(SETTINGS, SETTINGS.feature_size))


def test_a_video_needs_its_settings_and_its_token(tmp_path, clip, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"video": "clip.mp4", "prompt": "<video>"}\n')
    with pytest.raises(DataError, match="rows.jsonl:1: the row has a video, but data.video is not set"):
        load_prompts(tmp_path / "rows.jsonl", tokenizer, 100)
    other = VideoReader(VideoSettings(placeholder="<film>"), 192)
    with pytest.raises(DataError, match="no token '<film>' .data.video.placeholder."):
        load_prompts(tmp_path / "rows.jsonl", tokenizer, 100, other)


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
