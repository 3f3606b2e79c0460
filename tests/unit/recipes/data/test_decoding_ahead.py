"""Films and features of the next batches are read while this one is used."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import closing

import pytest
import torch
from safetensors.torch import save_file

from megatron_ext.rotary import Video
from recipes.data import clips
from recipes.data.clips import Clip, patchify
from recipes.data.decoding import DecodeAhead
from recipes.data.errors import VideoError
from recipes.data.frames import read_frames
from recipes.data.rows import Prompt
from recipes.data.sampler import EpochSampler
from tests.unit.recipes.data.media_row_cases import FIXED, prompts


def test_clips_are_decoded_ahead_by_other_processes(media, seeing, monkeypatch):
    """What the next batch shows is read by a process, not here, and is the same; a broken clip is told of where it is used."""
    monkeypatch.setattr(clips, "_recent", clips._Recent(1 << 20))
    rows = [{"video": name, "prompt": "<video>"} for name in ("clip.mp4", "tall.mp4", "broken.mp4")]
    found = prompts(media, seeing, FIXED, *rows)
    expected = patchify(read_frames(media / "tall.mp4", 2, 16, 16), 8)
    order = EpochSampler(3, 3, 1, 0, 1)
    ahead = DecodeAhead(1, found, order)
    here = []
    monkeypatch.setattr(clips, "read_frames", lambda *given: here.append(given[0]) or read_frames(*given))
    try:
        ahead.next_batch()
        assert order.state_dict()["drawn"] == 0, "it is not drawn by being looked at"
        assert torch.equal(found[1].for_model().content, expected)
        with pytest.raises(VideoError, match=r"rows.jsonl:3: .*broken.mp4"):
            found[2].for_model()
        assert found[0].for_model() and not here
        ahead.next_batch()
        assert {key[0][0].rpartition("/")[2] for key in clips._recent.coming} == {"broken.mp4"}, "the rest is there"
    finally:
        ahead.close()
    DecodeAhead(0, found, order).next_batch()
    assert not here


def test_features_of_any_type_are_read_ahead(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(clips, "_recent", clips._Recent(1 << 20))
    shown, written = [], []
    for number, dtype in enumerate((torch.bfloat16, torch.float16, torch.float64)):
        path = tmp_path / f"{number}.safetensors"
        written.append(torch.randn(2, 3, 1, 5, generator=rng).to(dtype))
        save_file({"features": written[-1]}, path)
        shown.append(Clip(str(path), Video(2, 3, 1), None, "row 1"))
    with closing(DecodeAhead(1, [Prompt((), {}, 1, tuple(shown))])) as ahead:
        ahead.ask([0])
        assert all(torch.equal(c.features(), w.flatten(0, 2).float()) for c, w in zip(shown, written, strict=True))


def test_what_has_been_read_ahead_and_is_not_used_is_given_up(monkeypatch):
    """Of two batches: a batch may be asked for before the one before it has been used."""
    monkeypatch.setattr(clips, "_recent", clips._Recent(1 << 20))
    shown = [Clip(f"{i}.npy", Video(1, 1, 1), None, "row 1") for i in range(8)]
    begun = {}
    for i in range(0, 8, 2):
        clips.read_ahead(shown[i : i + 2], lambda clip: begun.setdefault(clip.path, Future()))
        assert set(clips._recent.coming) == {clip.key for clip in shown[max(0, i - 2) : i + 2]}
    assert [future.cancelled() for future in begun.values()] == [True] * 4 + [False] * 4
