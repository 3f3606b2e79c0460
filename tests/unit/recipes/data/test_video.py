"""Real clips in: made with PyAV, decoded, sampled, cut into patches, kept, and shown by rows."""

from __future__ import annotations

import dataclasses
import json
import pickle

import av
import numpy as np
import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.rotary import Text, Video
from recipes.data import clips
from recipes.data.clips import Clip, patchify
from recipes.data.frames import read_frames
from recipes.data.moments import sample_frames
from recipes.data.rows import load_pairs, load_prompts
from recipes.data.tokenizer import load_tokenizer
from recipes.data.video import VideoReader
from tests.unit.recipes.data.clip_cases import SETTINGS, write_clip
from tools.make_word_problems import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """With a <video> token, as tools/make_video_problems.py makes it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, ["see no clip well a without a file yes user: assistant: <\n"], 300, special=("<video>",))
    return load_tokenizer(folder)


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
    assert seen.tokens.count(*seen.placeholders) == SETTINGS.grid.length == 4 * 2 * 3
    prompt = seen.for_model()
    before, after = (len(tokenizer.encode(text)) for text in ("see ", "well"))
    assert prompt.items == (Text(before), Video(4, 2, 3), Text(after))
    expected = patchify(read_frames(clip, 4, 16, 24), 8)
    assert torch.equal(prompt.content, expected)
    assert blind.for_model() == blind.tokens and not blind.media
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
    assert pair.prompt.tokens.count(*pair.prompt.placeholders) == SETTINGS.grid.length
    assert not all(pair.learnt) and tokenizer.decode(pair.response) == "yes\nuser:no clip\nassistant:yes\n"
    assert tokenizer.decode([t for t, it in zip(pair.response, pair.learnt, strict=True) if it]) == "yes\nyes\n"
    swapped = [{**questions[0], "content": "no clip"}, answer, {**questions[1], "content": "<video>see well"}, answer]
    path.write_text(json.dumps({"video": "clip.mp4", "messages": swapped}) + "\n")
    assert load_pairs(path, load_tokenizer(folder), 200, reader)
    with pytest.raises(UserError, match="rows.jsonl:1: a video's placeholder stands in the response"):
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


def test_what_was_read_last_is_kept_up_to_a_number_of_bytes(clip, monkeypatch):
    """A row's frames are decoded once, for all rows that name the file; what was not used for longest goes first."""
    small, wide = SETTINGS, dataclasses.replace(SETTINGS, width=48)
    small_and_wide = sum(how.num_frames * 3 * how.height * how.width for how in (small, wide))  # uint8
    recent = clips._Recent(small_and_wide)
    monkeypatch.setattr(clips, "_recent", recent)
    opened = []
    monkeypatch.setattr(clips, "read_frames", lambda *given: opened.append(given[3]) or read_frames(*given))

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
