"""Files that are cut short are refused, whatever they are and however many frames are asked for; whole ones are not."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch

from recipes.data.errors import VideoError
from recipes.data.frames import read_frames
from tests.media_files import numbered, write_film

PICTURES = [
    np.repeat(np.repeat(part, 8, 0), 8, 1)
    for part in np.random.default_rng(0).integers(0, 256, (48, 4, 6, 3), np.uint8)
]
# Name of a file, codec, pixels, options of the muxer.
FILMS = [
    ("front.mp4", "libx264", "yuv420p", {"movflags": "faststart"}),
    ("end.mp4", "mpeg4", "yuv420p", {}),
    ("parts.mp4", "libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
    ("a.mkv", "libx264", "yuv420p", {}),
    ("a.webm", "libvpx", "yuv420p", {}),
    ("a.avi", "mjpeg", "yuvj420p", {}),
    ("b.avi", "mpeg4", "yuv420p", {}),
    ("a.flv", "flv1", "yuv420p", {}),
    ("a.wmv", "wmv2", "yuv420p", {}),
    ("a.apng", "apng", "rgb24", {}),
    ("a.gif", "gif", "rgb8", {}),
]
films = pytest.mark.parametrize(("name", "codec", "pix_fmt", "mux"), FILMS, ids=[name for name, *_ in FILMS])


def draw(low: float, high: float, rng) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def write(path, codec, pix_fmt, mux) -> bytes:
    write_film(path, PICTURES, codec=codec, pix_fmt=pix_fmt, mux=mux, encode={"g": "12", "x264-params": "scenecut=0"})
    return path.read_bytes()


def refused(path) -> None:
    """At every number of frames, in one line that names the row."""
    for count in (1, 7):
        with pytest.raises(
            VideoError, match=f"^rows.jsonl:2: (cannot decode )?.*{path.name}( is cut short)?: "
        ) as caught:
            read_frames(path, count, 16, 16, "rows.jsonl:2")
        assert "\n" not in str(caught.value)


@films
def test_a_download_that_stopped_is_refused(name, codec, pix_fmt, mux, tmp_path, rng):
    whole = write(tmp_path / name, codec, pix_fmt, mux)
    assert read_frames(tmp_path / name, 5, 16, 16).shape == (5, 3, 16, 16)
    for _ in range(3):
        stop = int(len(whole) * draw(0.3, 0.93, rng))
        # What ends between two fragments, or two blocks of a GIF, is a whole film, a shorter one.
        blocks = whole[stop : stop + 3], whole[stop - 8 : stop - 5]
        stop += whole[stop + 4 : stop + 8] == b"moof" or (name == "a.gif" and b"!\xf9\x04" in blocks)
        (tmp_path / name).write_bytes(whole[:stop])
        refused(tmp_path / name)


@pytest.mark.parametrize(("name", "codec", "pix_fmt", "mux"), FILMS[:6], ids=[name for name, *_ in FILMS[:6]])
def test_space_that_was_never_filled_is_refused(name, codec, pix_fmt, mux, tmp_path, rng):
    """A downloader sets the whole length aside first; an index at the end may be there already."""
    whole = write(tmp_path / name, codec, pix_fmt, mux)
    kept = next((whole.index(mark) - 4 for mark in (b"moov", b"idx1") if mark in whole[len(whole) // 2 :]), len(whole))
    place = int(kept * draw(0.3, 0.8, rng))
    (tmp_path / name).write_bytes(whole[:place] + bytes(kept - place) + whole[kept:])
    refused(tmp_path / name)


def with_sound(path, seconds: int) -> None:
    """A film of `seconds`, and sound as long."""
    with av.open(str(path), "w") as container:
        picture, voice = (
            container.add_stream("libvpx", rate=8),
            container.add_stream("libopus", rate=48000, layout="mono"),
        )
        picture.height = picture.width = 32
        picture.pix_fmt = "yuv420p"
        noise = np.random.default_rng(0)
        for second in range(seconds):
            for _ in range(8):
                frame = av.VideoFrame.from_ndarray(noise.integers(0, 256, (32, 32, 3), np.uint8), format="rgb24")
                container.mux(picture.encode(frame))
            for part in range(50):
                frame = av.AudioFrame.from_ndarray(noise.random((1, 960), np.float32) / 4, format="flt", layout="mono")
                frame.rate, frame.pts = 48000, 960 * (50 * second + part)
                container.mux(voice.encode(frame))
        container.mux([*picture.encode(), *voice.encode()])


def test_sound_does_not_hide_what_is_missing(tmp_path, rng):
    with_sound(tmp_path / "talk.webm", 6)
    whole = (tmp_path / "talk.webm").read_bytes()
    assert read_frames(tmp_path / "talk.webm", 48, 16, 16).shape[0] == 48
    (tmp_path / "talk.webm").write_bytes(whole[: int(len(whole) * draw(0.3, 0.95, rng))])
    with pytest.raises(
        VideoError, match=r"talk.webm is cut short: \d+ of 4[78] frames can be decoded \(it holds \d+ of"
    ):
        read_frames(tmp_path / "talk.webm", 4, 16, 16)


def test_fragments_that_are_missing_altogether(tmp_path):
    """A stream that was saved piece by piece; its index says how many there should be."""
    write_film(tmp_path / "dash.mp4", PICTURES, codec="libx264", pix_fmt="yuv420p",
               mux={"movflags": "dash+frag_keyframe+global_sidx"},
               encode={"g": "12", "x264-params": "scenecut=0:bframes=0"})  # fmt: skip
    whole = (tmp_path / "dash.mp4").read_bytes()
    third = [i for i in range(len(whole)) if whole[i : i + 4] == b"moof"][2] - 4
    (tmp_path / "dash.mp4").write_bytes(whole[:third])
    with pytest.raises(
        VideoError, match=r"dash.mp4 is cut short: 24 of 48 frames can be decoded \(it ends after 2.40 of"
    ):
        read_frames(tmp_path / "dash.mp4", 4, 16, 16)


@pytest.mark.parametrize("how", ["jpg", "progressive", "gif", "png", "webp", "bmp", "tiff", "avif"])
def test_half_a_picture_is_refused(how, tmp_path, rng):
    """FFmpeg paints the rest of a JPEG grey and says nothing."""
    from PIL import Image

    kind = "jpg" if how == "progressive" else how
    more = {"progressive": True, "quality": 90} if how == "progressive" else {}
    picture = Image.fromarray(PICTURES[0]).resize((240, 160))
    preview = io.BytesIO()
    picture.resize((48, 32)).save(preview, "JPEG")
    exif = Image.Exif()
    exif[0x9286] = preview.getvalue()  # holds an end marker of its own
    picture.save(tmp_path / f"whole.{kind}", exif=exif, **more) if kind == "jpg" else picture.save(
        tmp_path / f"whole.{kind}"
    )
    whole = (tmp_path / f"whole.{kind}").read_bytes()
    assert read_frames(tmp_path / f"whole.{kind}", 2, 16, 16).shape[0] == 2
    for part in (draw(0.7, 0.98, rng), 0.995 if kind in ("jpg", "gif") else 0.9):
        (tmp_path / f"part.{kind}").write_bytes(whole[: int(len(whole) * part)])
        refused(tmp_path / f"part.{kind}")


@pytest.mark.parametrize("name", ["a.jpg", "a.gif", "a.mp4", "a.avi"])
def test_what_a_camera_wrote_behind_does_no_harm(name, tmp_path, rng):
    from PIL import Image

    path = tmp_path / name
    if path.suffix in (".jpg", ".gif"):
        Image.fromarray(PICTURES[0]).save(path)
    else:
        write(path, "mpeg4", "yuv420p", {})
    expected = read_frames(path, 3, 16, 16)
    path.write_bytes(path.read_bytes() + b"SEFT" + bytes(torch.randint(256, (500,), generator=rng).tolist()))
    assert torch.equal(read_frames(path, 3, 16, 16), expected)


def test_a_live_recording_promises_nothing(tmp_path):
    """Its header was written before anyone knew the length: what can be decoded is the clip."""
    write_film(
        tmp_path / "live.webm", [numbered(i) for i in range(40)], codec="libvpx", pix_fmt="yuv420p", mux={"live": "1"}
    )
    whole = (tmp_path / "live.webm").read_bytes()
    with av.open(str(tmp_path / "live.webm")) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    (tmp_path / "live.webm").write_bytes(whole[: places[30] - 8])
    assert read_frames(tmp_path / "live.webm", 30, 16, 16).shape[0] == 30
