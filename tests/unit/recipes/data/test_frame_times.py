"""When the frames of a video are shown, as Qwen3-VL's text says it: of lists of frames, and of films."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import Text, Video, layout
from megatron_ext.vision import VisionConfig
from recipes.data.errors import VideoError
from recipes.data.frames import probe, read_frames
from recipes.data.media_rows import with_folder
from recipes.data.moments import sample_frames, standing, times_of_frames
from recipes.data.video import VideoReader
from recipes.data.video_settings import VideoSettings
from tests.gpt_cases import small_config
from tests.media_files import number_of, numbered, write_film
from tests.published_positions import by_transformers
from tests.vision_cases import QWEN_PREPROCESSING, qwen_tower


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a.png .. d.png, and clip.mp4 of 20 frames in 2.5 seconds."""
    found = tmp_path_factory.mktemp("media")
    for name in "abcd":
        write_film(found / f"{name}.png", [numbered(1)], codec="png", pix_fmt="rgb24", mux={"update": "1"})
    write_film(found / "clip.mp4", [numbered(i) for i in range(20)], codec="libx264", pix_fmt="yuv420p", rate=8)
    return found


def qwen3_reader(**settings) -> VideoReader:
    eyes = VisionConfig(tower_config=qwen_tower("qwen3_vl"), preprocessing=QWEN_PREPROCESSING)
    how = VideoSettings(timestamps="<{seconds:.1f} seconds>", **settings)
    return VideoReader.of(how, small_config(vision=eyes, position_embedding=PositionEmbedding("qwen3_vl")))


def written_by_transformers(indices: list[int], fps: float) -> str:
    from transformers import Qwen3VLProcessor

    moments = Qwen3VLProcessor._calculate_timestamps(None, [*indices], fps, 2)
    return "".join(f"<{moment:.1f} seconds><video>" for moment in moments)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9])
def test_moments_of_a_list_of_frames_are_those_that_transformers_writes(count, folder, rng):
    """Pairs by their mean, the last frame of an odd list twice; by frames of a second, and by times."""
    fps = float(torch.empty(()).uniform_(0.3, 20, generator=rng))
    names = [f"{'abcd'[i % 4]}.png" for i in range(count)]
    expected = written_by_transformers([*range(count)], fps)
    times = [number / fps for number in range(count)]
    reader = qwen3_reader(fps=100)
    for said in ({"fps": fps}, {"times": times}):
        _, (clip,) = reader.read_row({"video": {"frames": names} | said, "prompt": "<video>"}, folder, "here")
        assert clip.text == expected and len(clip.items) == -(-count // 2)
        assert [f.rpartition("/")[2] for f in clip.frames] == names + names[-1:] * (count % 2)
    part = {"type": "video", "video": names, "sample_fps": str(fps)}
    row, (clip,) = reader.read_row({"messages": [{"role": "user", "content": [part]}]}, folder, "here")
    assert clip.text == expected == row["messages"][0]["content"] and len(clip.pixels().values) % 2 == 0
    assert with_folder({"video": {"frames": names, "fps": fps}}, folder)["video"]["frames"][0] == str(folder / "a.png")


def test_a_list_of_frames_with_times_is_sampled_as_a_clip(folder):
    """So many a second, and of frames at other distances those that stand in the middle of equal stretches."""
    names = [f"{'abcd'[i % 4]}.png" for i in range(16)]
    _, (clip,) = qwen3_reader(fps=2).read_row({"video": {"frames": names, "fps": 8}, "prompt": "<video>"}, folder, "x")
    assert clip.text == written_by_transformers([2, 6, 10, 14], 8)  # of two seconds
    uneven = {"frames": ["a.png", "b.png", "c.png", "d.png"], "times": [10, 10.5, 11, 19]}  # and then 3 seconds more
    _, (clip,) = qwen3_reader(num_frames=4).read_row({"video": uneven, "prompt": "<video>"}, folder, "x")
    assert [f[-5] for f in clip.frames] == ["c", "c", "c", "d"] and clip.grid.seconds == (11.0, 15.0)


def test_as_many_frames_are_taken_as_the_seconds_have(rng):
    """Of lists at whole rates, counted in whole numbers: count / fps x rate, but no more than there are. At 40 and 50 a second
    times are whole milliseconds, which may be rounded ones, and a second is not known so well."""
    drawn = torch.randint(1, 61, (2000, 3), generator=rng).tolist()
    cases = [(240, 24, 2), (60, 6, 6), *(case for case in drawn if case[1] not in (40, 50))]
    for count, fps, rate in cases:
        said = times_of_frames([number / fps for number in range(count)])
        how = VideoSettings(fps=rate, fps_min_frames=1)
        expected = min(count, max(count * rate // fps, 1)) if count > 1 else 1
        assert how.frames_of(said.seconds, count, said.short) == expected, (count, fps, rate)
        assert said.edges[-1] / said.edges[1] == pytest.approx(count, rel=1e-4)
        assert standing(said.edges, expected) == sample_frames(count, expected), (count, fps, rate)


@pytest.mark.parametrize("decimals", [3, 4, 5, 6, None])
def test_no_frame_is_lost_to_the_rounding_of_times(decimals, rng):
    """At any rate, from any start, with so many decimals or as floats have them: asked for as many a second as there are, a list
    shows each once, and asked for half of them, every other one."""
    for _ in range(300):
        fps = float(torch.empty(()).uniform_(0.2, 60, generator=rng))
        start = float(torch.empty(()).uniform_(0, 1000, generator=rng))
        count = 2 * int(torch.randint(1, 40, (), generator=rng))
        times = [start + number / fps for number in range(count)]
        times = times if decimals is None else [round(time, decimals) for time in times]
        said, how = times_of_frames(times), VideoSettings(fps=fps, fps_min_frames=1)
        assert how.frames_of(said.seconds, count, said.short) == count, (fps, start, count)
        assert standing(said.edges, count) == [*range(count)]
        assert standing(said.edges, count // 2) == [*range(1, count, 2)]


def test_times_in_tenths_of_what_is_no_tenth_are_at_equal_distances(rng):
    """3 a second, as 0.3, 0.7, 1.0; seconds that are written whole are meant so."""
    for count in torch.randint(4, 100, (50,), generator=rng).tolist():
        for start in (0.0, 4.3, 17.0):
            said = times_of_frames([start + round(number / 3, 1) for number in range(count)])
            assert VideoSettings(fps=3, fps_min_frames=1).frames_of(said.seconds, count, said.short) == count
            assert standing(said.edges, count) == [*range(count)]
        said = times_of_frames([float(2 * number) for number in range(count)])
        rate = 0.49 - 0.01 / count  # of a frame too little for the last one of these
        assert VideoSettings(fps=rate, fps_min_frames=1).frames_of(said.seconds, count, said.short) == max(
            int(2 * count * rate), 1
        )
    said = times_of_frames([0, 1, 2, 4, 5, 6])  # one is missing: these are no rounding
    assert standing(said.edges, 6) == [0, 1, 2, 3, 4, 5] and standing(said.edges, 2) == [1, 4]
    assert said.seconds == pytest.approx(7.2) and standing(said.edges, 4) == [0, 2, 3, 5]


def test_counts_are_those_of_transformers_sampler(rng):
    """Of Qwen3-VL's, of lists at a rate; but where a product of floats costs it a frame. Qwen2-VL's needs torchvision."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    bounds = SimpleNamespace(min_frames=4, max_frames=64, fps=None)
    lost = 0
    for _ in range(500):
        count = int(torch.randint(4, 200, (), generator=rng))
        fps, rate = (round(float(torch.empty(()).uniform_(0.5, 30, generator=rng)), 2) for _ in range(2))
        given = SimpleNamespace(total_num_frames=count, fps=fps)
        how = VideoSettings(fps=rate, fps_min_frames=4, fps_max_frames=64)
        said = times_of_frames([number / fps for number in range(count)])
        found = how.frames_of(said.seconds, count, said.short)
        exact = Fraction(count) / Fraction(str(fps)) * Fraction(str(rate))
        assert found == min(max(int(exact + Fraction(said.short) * Fraction(rate)), 4), 64, count)
        theirs = len(Qwen3VLVideoProcessor.sample_frames(bounds, given, fps=rate))
        lost += found != theirs
        # Times in whole milliseconds may be short by one, and the last frame stays for their mean distance.
        less = 1e-3 * (1 + rate) * count / (count - 1)
        assert found == theirs or found == theirs + 1 and math.ceil(exact) - exact < less
    assert lost < 25  # of 500


def test_a_film_with_times_in_milliseconds_keeps_its_last_frame(tmp_path, rng):
    """Matroska's and WebM's, at whatever rate: as many a second as it has are all of its pictures."""
    for kind, codec in (("mkv", "libx264"), ("webm", "libvpx"), ("flv", "flv"), ("mp4", "libx264")):
        rate = [7, 24, 30, Fraction(30000, 1001), 60][int(torch.randint(5, (), generator=rng))]
        count = int(torch.randint(5, 40, (), generator=rng))
        write_film(tmp_path / f"a.{kind}", [numbered(1)] * count, codec=codec, pix_fmt="yuv420p", rate=rate)
        shape = probe(tmp_path / f"a.{kind}")
        found = VideoSettings(fps=float(rate), fps_min_frames=1).frames_of(shape.seconds, shape.pictures, shape.short)
        assert found == count == shape.pictures, (kind, rate)


@pytest.mark.parametrize("said", [{}, {"fps": 2}])
def test_all_frames_of_a_list_are_shown_though_a_token_shows_several(said, folder, rng):
    """The last one again until it has; with a tower, too."""
    count = int(torch.randint(1, 30, (), generator=rng))
    names = [f"{'abcd'[i % 4]}.png" for i in range(count)]
    for each in (2, 3):
        how = VideoSettings(fps=2, frames_per_patch=each, height=16, width=16)
        row = {"video": {"frames": names, **said} if said else None, "videos": None if said else [names]}
        _, (clip,) = VideoReader(how, how.feature_size).read_row(row | {"prompt": "<video>"}, folder, "x")
        missing = -count % each
        assert [f.rpartition("/")[2] for f in clip.frames] == names + names[-1:] * missing
        assert clip.grid.t == (count + missing) // each


@pytest.mark.parametrize("fps", [0.5, 1, 2, 4])
def test_an_odd_list_of_frames_stands_where_transformers_puts_it(fps, folder, rng):
    """Under Qwen2.5-VL's scheme, whose frames are equally far apart, also those of the last token."""
    count = 2 * int(torch.randint(1, 8, (), generator=rng)) + 1
    eyes = VisionConfig(tower_config=qwen_tower("qwen2_5_vl"), preprocessing=QWEN_PREPROCESSING)
    model = small_config(vision=eyes, position_embedding=PositionEmbedding("qwen2_5_vl"))
    said = {"frames": [f"{'abcd'[i % 4]}.png" for i in range(count)], "fps": fps}
    reader = VideoReader.of(VideoSettings(fps=100), model)
    _, (clip,) = reader.read_row({"video": said, "prompt": "<video>"}, folder, "x")
    there = Video(clip.grid.t, clip.grid.h, clip.grid.w, tuple(2 / fps * i for i in range(clip.grid.t)))
    assert clip.grid.t == (count + 1) // 2
    expected = by_transformers("qwen2_5_vl", "Qwen2_5_VLModel", [(Text(3), 0), (there, 2), (Text(2), 0)], False)
    assert torch.equal(layout([Text(3), clip.grid, Text(2)], "qwen2_5_vl").ids, expected)


@pytest.mark.parametrize("times", [[1e303, 1e304], [0, 2e12], [0, 10**400]])
def test_times_that_are_none_are_one_line(times, folder):
    said = {"frames": ["a.png", "b.png"], "times": times}
    with pytest.raises(
        VideoError, match=r"^x: times of video must be ascending seconds, one of each of its 2 frames, up to 1e\+12, "
    ) as caught:
        qwen3_reader(fps=2).read_row({"video": said, "prompt": "<video>"}, folder, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [3, 4, 7, 12])
def test_moments_of_a_film_are_those_that_transformers_writes_for_its_pictures(count, folder):
    """Of the pictures that are shown, in the middle of equal stretches; an odd number of frames is one more."""
    _, (clip,) = qwen3_reader(num_frames=count).read_row({"video": "clip.mp4", "prompt": "<video>"}, folder, "x")
    even = count + count % 2
    assert clip.text == written_by_transformers([int((i + 0.5) * 20 / even) for i in range(even)], 8)


def test_moments_of_a_film_whose_pictures_come_at_other_distances(tmp_path, rng):
    """By its own timestamps, where transformers takes a mean rate."""
    stamps = [0, *torch.randint(40, 900, (12,), generator=rng).cumsum(0).tolist()]  # milliseconds
    pictures = [numbered(number, 32, 48) for number in range(13)]
    write_film(tmp_path / "film.mkv", pictures, stamps, codec="libx264", pix_fmt="yuv420p")
    _, (clip,) = qwen3_reader(num_frames=6).read_row({"video": "film.mkv", "prompt": "<video>"}, tmp_path, "x")
    seen = [stamps[number_of(frame)] / 1000 for frame in read_frames(tmp_path / "film.mkv", 6, 32, 48)]
    assert clip.grid.seconds == pytest.approx([(seen[i] + seen[i + 1]) / 2 for i in (0, 2, 4)], abs=2e-3)
