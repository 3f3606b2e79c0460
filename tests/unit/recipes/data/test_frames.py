"""Which frames of a film are read: what a viewer sees at each moment, in the stream that a player chooses, of a whole file."""

from __future__ import annotations

import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.errors import VideoError
from recipes.data.frames import read_frames
from recipes.data.moments import sample_frames
from tests.media_files import number_of, numbered, write_film

# Containers whose pictures have timestamps of their own, with a codec that loses nothing.
STAMPED = {"mov": ("png", "rgb24"), "mkv": ("ffv1", "bgr0"), "avi": ("ffv1", "bgr0")}
ONE_KEY_FRAME = {"crf": "4", "bf": "0", "g": "50", "x264-params": "scenecut=0"}
RATES = [Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 50, 60]


def numbers(path, count: int) -> list[int]:
    return [number_of(frame) for frame in read_frames(path, count, 16, 16)]


def seen_at(stamps: list[int], end: int, count: int) -> list[int]:
    """For each middle of `count` stretches of the time from the first stamp to the end: the last picture that has come."""
    moments = [stamps[0] + Fraction(2 * i + 1, 2 * count) * (end - stamps[0]) for i in range(count)]
    return [max(number for number, stamp in enumerate(stamps) if stamp <= moment) for moment in moments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("films")


@settings(max_examples=25)
@given(data=st.data(), kind=st.sampled_from(sorted(STAMPED)))
def test_frames_are_what_is_on_the_screen_in_the_middle_of_equal_stretches(data, kind, folder):
    """At freely drawn timestamps, late starts included."""
    gaps = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    start = data.draw(st.integers(0, 50)) if kind == "mkv" else 0
    stamps = [start + sum(gaps[:i]) for i in range(len(gaps) + 1)]
    path, (codec, pix_fmt) = folder / f"drawn.{kind}", STAMPED[kind]
    pictures = [numbered(i) for i in range(len(stamps))]
    write_film(path, pictures, [10 * s for s in stamps] if kind != "avi" else stamps, codec=codec, pix_fmt=pix_fmt,
               base=Fraction(1, 10) if kind == "avi" else Fraction(1, 1000))  # fmt: skip
    # The last picture stays for a frame at the rate of 10: 100 ms.
    end = stamps[-1] + (1 if kind == "avi" else 10)
    for count in data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)):
        assert numbers(path, count) == seen_at(stamps, end, count)


def test_a_screen_recording_is_sampled_by_time(tmp_path):
    """Five seconds of movement in a minute: `select='lt(n,50)+eq(n,599)'` at 10 frames per second."""
    stamps = [100 * i for i in range(50)] + [59_900]
    for name, codec, pix_fmt in (("screen.mp4", "libx264", "yuv420p"), ("screen.webm", "libvpx", "yuv420p")):
        write_film(tmp_path / name, [numbered(i) for i in range(51)], stamps, codec=codec, pix_fmt=pix_fmt,
                   encode={"crf": "4"})  # fmt: skip
        found = numbers(tmp_path / name, 8)
        assert found == [37] + [49] * 7  # at 3.75 s, 11.25 s, ...


@pytest.mark.parametrize("kind", ["mkv", "webm", "mov"])
def test_a_constant_rate_is_counted_whatever_the_time_base(kind, tmp_path, rng):
    """Matroska rounds to milliseconds: that may not decide which of two pictures is shown."""
    codec, pix_fmt = STAMPED.get(kind, ("libvpx", "yuv420p"))
    for _ in range(3):
        rate = RATES[int(torch.randint(len(RATES), (), generator=rng))]
        total = 2 * int(torch.randint(4, 31, (), generator=rng))  # so that half of them is asked for on the changes
        pictures = [numbered(i) for i in range(total)]
        write_film(tmp_path / f"a.{kind}", pictures, codec=codec, pix_fmt=pix_fmt, rate=rate, encode={"crf": "4"})
        for count in (total // 2, total, int(torch.randint(1, 20, (), generator=rng))):
            assert numbers(tmp_path / f"a.{kind}", count) == sample_frames(total, count), (rate, total, count)


def test_what_an_edit_list_leaves_out_is_not_shown(tmp_path):
    """Pictures before zero are needed to decode the others, and not seen: a clip cut without encoding."""
    stamps = [*range(-700, 0, 100), 0, 250, 300, 800]
    write_film(tmp_path / "cut.mp4", [numbered(i) for i in range(len(stamps))], stamps, codec="libx264", pix_fmt="yuv420p",
               mux={"avoid_negative_ts": "disabled"}, encode=ONE_KEY_FRAME)  # fmt: skip
    with av.open(str(tmp_path / "cut.mp4")) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == 7
    assert numbers(tmp_path / "cut.mp4", 9) == [7 + number for number in seen_at([0, 250, 300, 800], 900, 9)]


def hide(packet: av.Packet) -> av.Packet:
    """The packet of a VP8 key frame, with its bit "to be shown" off."""
    data = bytearray(packet)
    data[0] &= ~0x10
    hidden = av.Packet(bytes(data))
    hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
    hidden.is_keyframe = True
    return hidden


@pytest.mark.parametrize("count", [1, 3, 8, 24])
def test_hidden_pictures_are_no_pictures(count, tmp_path):
    """Two-pass VP8 has packets that are decoded and not shown (alternative references)."""
    write_film(tmp_path / "plain.webm", [numbered(i) for i in range(24)], codec="libvpx", pix_fmt="yuv420p",
               encode={"g": "3", "crf": "4"})  # fmt: skip
    with av.open(str(tmp_path / "plain.webm")) as plain, av.open(str(tmp_path / "hidden.webm"), "w") as container:
        stream = container.add_stream_from_template(plain.streams.video[0])
        for packet in plain.demux(video=0):
            if packet.size:
                for one in [hide(packet), packet] if packet.is_keyframe else [packet]:
                    one.stream = stream
                    container.mux(one)
    with av.open(str(tmp_path / "hidden.webm")) as container:
        assert sum(bool(packet.size) for packet in container.demux(video=0)) == 32
    assert torch.equal(
        read_frames(tmp_path / "hidden.webm", count, 16, 16), read_frames(tmp_path / "plain.webm", count, 16, 16)
    )


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_dropped_picture_leaves_the_one_before_it_on_the_screen(codec, tmp_path):
    """AVI stores it as an empty packet, and its header counts it."""
    stamps = [*range(10), *range(31, 60)]
    write_film(tmp_path / "dropped.avi", [numbered(i) for i in stamps], stamps, codec=codec, pix_fmt="yuv420p",
               base=Fraction(1, 10), encode={"bf": "0", "qmax": "1", "qmin": "1", "crf": "4"})  # fmt: skip
    with av.open(str(tmp_path / "dropped.avi")) as container:
        assert container.streams.video[0].frames == 60
    for count in (1, 4, 6, 60):
        assert numbers(tmp_path / "dropped.avi", count) == [stamps[i] for i in seen_at(stamps, 60, count)]


def streams_file(path, streams: list[tuple[int, Disposition]], sound: bool = False) -> None:
    """One stream for each (number that its pictures say, what it is for); covers have one picture, films eight."""
    with av.open(str(path), "w") as container:
        opened = []
        for number, disposition in streams:
            cover = bool(disposition & Disposition.attached_pic)
            stream = container.add_stream("png" if cover else "libx264", rate=8)
            stream.height, stream.width = (64, 64) if cover else (16, 16)
            stream.pix_fmt = "rgb24" if stream.name == "png" else "yuv420p"
            stream.disposition = disposition
            opened.append((stream, number, 1 if cover else 8))
        if sound:
            voice = container.add_stream("aac", rate=16000, layout="mono")
        for stream, number, count in opened:
            for _ in range(count):
                frame = av.VideoFrame.from_ndarray(numbered(number, stream.height, stream.width), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        if sound:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.rate = 16000
            container.mux([*voice.encode(frame), *voice.encode()])


NONE, DEFAULT, COVER = Disposition(0), Disposition.default, Disposition.attached_pic


@pytest.mark.parametrize(
    ("name", "streams", "expected"),
    [
        ("a.mp4", [(9, COVER), (20, DEFAULT)], 20),
        ("b.mp4", [(20, DEFAULT), (9, COVER)], 20),
        ("c.mkv", [(9, NONE), (20, DEFAULT)], 20),
        ("d.mkv", [(20, DEFAULT), (9, NONE)], 20),
        ("e.mkv", [(9, Disposition.visual_impaired), (20, NONE)], 20),
    ],
)
def test_the_stream_is_the_one_that_players_choose(name, streams, expected, tmp_path):
    streams_file(tmp_path / name, streams)
    assert numbers(tmp_path / name, 3) == [expected] * 3


def test_a_cover_is_no_film(tmp_path):
    streams_file(tmp_path / "song.mp4", [(9, COVER)], sound=True)
    with pytest.raises(VideoError, match="^rows.jsonl:3: .*song.mp4 has no video stream, only a cover$"):
        read_frames(tmp_path / "song.mp4", 1, 16, 16, "rows.jsonl:3")


@pytest.mark.parametrize("name", ["a%d.png", "50%20off.png", "10:30.png", "what?.png", "a*.png", "{a}.png"])
def test_a_name_means_itself(name, tmp_path, monkeypatch):
    """FFmpeg reads patterns and protocols in names: `a%d.png` is a0.png, a1.png, ..."""
    monkeypatch.chdir(tmp_path)
    from PIL import Image

    for i, near in enumerate((name, "a0.png", "a1.png", "a2.png", "50" + "1".zfill(20) + "off.png")):
        Image.fromarray(numbered(20 + i)).save(near)
    assert numbers(name, 2) == [20, 20]


def test_a_recording_may_begin_between_key_frames(tmp_path):
    """As ffplay does, it is shown from the first picture that can be decoded."""
    pictures = [numbered(i) for i in range(40)]
    write_film(tmp_path / "all.ts", pictures, codec="libx264", pix_fmt="yuv420p",
               encode=ONE_KEY_FRAME | {"g": "10"})  # fmt: skip
    with av.open(str(tmp_path / "all.ts")) as container:
        second = [p.pos for p in container.demux(video=0) if p.size][1]
    (tmp_path / "later.ts").write_bytes((tmp_path / "all.ts").read_bytes()[second:])
    assert numbers(tmp_path / "later.ts", 30) == list(range(10, 40))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_few_frames_are_in_memory(tmp_path):
    from tools.bench_common import PeakMemory

    pictures = [numbered(i, 360, 640) for i in range(2)] * 120
    write_film(tmp_path / "long.mp4", pictures, codec="mpeg4", pix_fmt="yuv420p")  # 240 of 0.7 MB
    with PeakMemory(torch.device("cpu")) as peak:
        read_frames(tmp_path / "long.mp4", 8, 16, 16)
    assert peak.growth < 80 << 20  # FFmpeg keeps a few for each of its threads
