"""A picture as a viewer shows it: which way up, on what, in which colours."""

from __future__ import annotations

import os
import tarfile
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from recipes.data.errors import VideoError
from recipes.data.frames import probe, read_frames
from tests.media_files import number_of, numbered, write_film

ONE = 1 << 16
# EXIF's numbers, and the display matrix (a, b, c, d) that says the same.
MATRICES = {
    1: (ONE, 0, 0, ONE), 2: (-ONE, 0, 0, ONE), 3: (-ONE, 0, 0, -ONE), 4: (ONE, 0, 0, -ONE),
    5: (0, ONE, ONE, 0), 6: (0, ONE, -ONE, 0), 7: (0, -ONE, -ONE, 0), 8: (0, -ONE, ONE, 0),
}  # fmt: skip
orientations = pytest.mark.parametrize("orientation", MATRICES)


def drawn(rng, rows: int = 4, columns: int = 6, size: int = 8) -> np.ndarray:
    """[rows x size, columns x size, 3] of squares in random colours."""
    squares = torch.randint(256, (rows, columns, 3), generator=rng, dtype=torch.uint8).numpy()
    return np.repeat(np.repeat(squares, size, 0), size, 1)


def upright(picture: np.ndarray, orientation: int) -> np.ndarray:
    """By the words of EXIF: what the first row and the first column of the stored picture are to a viewer."""
    rows = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}[orientation]
    columns = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}[orientation]
    if rows in ("left", "right"):
        picture, rows, columns = picture.swapaxes(0, 1), columns, rows
    return picture[:: 1 if rows == "top" else -1, :: 1 if columns == "left" else -1]


def read(path, like: np.ndarray) -> np.ndarray:
    return read_frames(path, 1, *like.shape[:2])[0].permute(1, 2, 0).numpy().astype(int)


@orientations
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_pictures_stand_as_exif_says(kind, orientation, tmp_path, rng):
    from PIL import Image, ImageOps

    picture = Image.fromarray(drawn(rng))
    exif = picture.getexif()
    exif[0x112] = orientation
    how = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    picture.save(tmp_path / f"a.{kind}", exif=exif, **how)
    expected = upright(np.asarray(picture), orientation)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(picture)), expected), "Pillow agrees"
    assert np.abs(read(tmp_path / f"a.{kind}", expected) - expected).max() <= 4


@orientations
def test_films_stand_as_their_matrix_says(orientation, tmp_path, rng):
    """Turned by a phone, or mirrored by its front camera; a matrix may scale and be off by a little, too."""
    pictures = [drawn(rng) for _ in range(2)]
    a, b, c, d = MATRICES[orientation]
    slip = int(torch.randint(-300, 300, (), generator=rng))
    matrix = [a, b or slip, 0, c or -slip, d, 0, 48 * ONE, 0, 1 << 30] if a else [slip, b, 0, c, slip, 0, 0, 0, 1 << 30]
    write_film(tmp_path / "a.mov", pictures, codec="png", pix_fmt="rgb24", matrix=matrix)
    expected = [upright(picture, orientation) for picture in pictures]
    found = read_frames(tmp_path / "a.mov", 2, *expected[0].shape[:2]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, np.stack(expected))


def test_resizing_and_turning_can_change_places(tmp_path, rng):
    pictures = [drawn(rng)]
    write_film(tmp_path / "flat.mov", pictures, codec="png", pix_fmt="rgb24")
    write_film(
        tmp_path / "turned.mov", pictures, codec="png", pix_fmt="rgb24", matrix=[0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30]
    )
    flat = read_frames(tmp_path / "flat.mov", 1, 24, 16)
    assert torch.equal(read_frames(tmp_path / "turned.mov", 1, 16, 24), torch.rot90(flat, -1, (2, 3)))


@pytest.mark.parametrize("degrees", [3, 30, 45, 135])
def test_an_angle_between_is_refused(degrees, tmp_path, rng):
    sine, cosine = (round(ONE * f(np.deg2rad(degrees))) for f in (np.sin, np.cos))
    write_film(tmp_path / "a.mov", [drawn(rng)], codec="png", pix_fmt="rgb24",
               matrix=[cosine, sine, 0, -sine, cosine, 0, 0, 0, 1 << 30])  # fmt: skip
    with pytest.raises(
        VideoError, match=r"^rows.jsonl:4: cannot decode .*a.mov: it is shown at an angle \(-\d+ degrees\); only"
    ):
        read_frames(tmp_path / "a.mov", 1, 16, 16, "rows.jsonl:4")


def transparent(rng) -> np.ndarray:
    """[32, 48, 4]; about a third of the squares is invisible, a third half so, some of each, and all have a colour."""
    kinds = torch.cat([torch.arange(3), torch.randint(3, (21,), generator=rng)])[torch.randperm(24, generator=rng)]
    alpha = np.array([0, 120, 255], np.uint8)[kinds.view(4, 6).numpy()]
    return np.concatenate([drawn(rng), np.repeat(np.repeat(alpha, 8, 0), 8, 1)[..., None]], -1)


def on_white(picture: np.ndarray) -> np.ndarray:
    from PIL import Image

    white = Image.new("RGBA", picture.shape[1::-1], "white")
    return np.asarray(Image.alpha_composite(white, Image.fromarray(picture)).convert("RGB")).astype(int)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "avif"])
def test_what_is_transparent_is_white(kind, tmp_path, rng):
    from PIL import Image

    picture = transparent(rng)
    how = {"webp": {"lossless": True, "exact": True}, "avif": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    Image.fromarray(picture).save(tmp_path / f"a.{kind}", **how)
    assert np.abs(read(tmp_path / f"a.{kind}", picture) - on_white(picture)).max() <= (3 if kind == "avif" else 1)


def test_palettes_and_greys_may_be_transparent(tmp_path, rng):
    from PIL import Image

    picture = transparent(rng)
    picture[..., 3] = np.where(picture[..., 3] > 100, 255, 0)
    clear = picture[..., 3] == 0
    few = Image.fromarray(np.where(clear, 0, 1 + picture[..., 0] % 7).astype(np.uint8), "P")
    few.putpalette([250, 0, 0, *range(30, 51)])
    few.save(tmp_path / "p.png", transparency=0)
    few.save(tmp_path / "p.gif", transparency=0)
    colours = np.array([[250, 0, 0], *np.arange(30, 51).reshape(7, 3)])
    expected = np.where(clear[..., None], 255, colours[np.asarray(few)])
    assert np.array_equal(read(tmp_path / "p.png", picture), expected)
    assert np.array_equal(read(tmp_path / "p.gif", picture), expected)
    grey = picture[..., [0, 3]]
    Image.fromarray(np.ascontiguousarray(grey), "LA").save(tmp_path / "la.png")
    expected = np.where(clear, 255, grey[..., 0])[..., None].repeat(3, -1)
    assert np.array_equal(read(tmp_path / "la.png", picture), expected)


def test_a_hidden_colour_reaches_no_neighbour(tmp_path):
    """Blended first, resized then: the red behind the hole is nowhere."""
    from PIL import Image

    picture = np.zeros((64, 64, 4), np.uint8)
    picture[..., 0], picture[:, 20:, 3] = 255, 0
    picture[:, :20] = (0, 0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "a.png")
    found = read_frames(tmp_path / "a.png", 1, 16, 16)[0].int()
    assert (found[0] - found[1]).abs().max() <= 1 and int(found.max()) == 255 and int(found.min()) == 0


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_films_may_be_transparent(codec, tmp_path, rng):
    """WebM's alpha, which FFmpeg's own decoders leave out."""
    picture = transparent(rng)
    write_film(tmp_path / "a.webm", [picture] * 3, codec=codec, pix_fmt="yuva420p",
               encode={"crf": "4", "auto-alt-ref": "0"})  # fmt: skip
    found = read(tmp_path / "a.webm", picture).reshape(4, 8, 6, 8, 3)[:, 3:5, :, 3:5].mean((1, 3))
    expected = on_white(picture)[4::8, 4::8]
    assert np.abs(found - expected).mean() < 12, "colours of neighbours run into each other, at 4:2:0"
    assert np.abs(found - expected)[picture[4::8, 4::8, 3] == 0].mean() < 8


def test_a_byte_that_holds_no_alpha(tmp_path, rng):
    """Uncompressed 32-bit AVI of screen recorders: FFmpeg calls the fourth byte alpha, and it is zero."""
    picture = np.concatenate([drawn(rng), np.zeros((32, 48, 1), np.uint8)], -1)
    write_film(tmp_path / "a.avi", [picture] * 2, codec="rawvideo", pix_fmt="bgra")
    assert np.array_equal(read(tmp_path / "a.avi", picture), picture[..., :3])


RANGES, SPACES = {"limited": 1, "full": 2}, {"bt709": (1, "ITU709"), "bt601": (6, "ITU601"), "bt2020": (9, "BT2020")}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("how", RANGES)
def test_colours_are_those_that_were_meant(how, space, tmp_path, rng):
    """Full or limited range, by the matrix that the file names."""
    from av.video.reformatter import ColorRange, Colorspace

    picture, (number, name) = drawn(rng), SPACES[space]
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    frame = frame.reformat(format="yuv444p", dst_colorspace=Colorspace[name], dst_color_range=ColorRange(RANGES[how]))
    save_frame(tmp_path / "a.mkv", frame, "yuv444p", colorspace=number, color_range=RANGES[how])
    assert np.abs(read(tmp_path / "a.mkv", picture) - picture).max() <= 3


def save_frame(path, frame: av.VideoFrame, pix_fmt: str, **tags: int) -> None:
    """As it is, without loss; `tags` say what its numbers mean."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        frame.pts, frame.time_base = 0, Fraction(1, 5)
        container.mux([*stream.encode(frame), *stream.encode()])


# Reference white of 203 nits (ITU-R BT.2408): of PQ's 10000, and where HLG's curve (ITU-R BT.2100) has its 75 %.
def pq(light: np.ndarray) -> np.ndarray:
    power = (light * 203 / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light: np.ndarray) -> np.ndarray:
    """With the display's gamma of 1.2 taken back."""
    scene = 0.2656 * light ** (1 / 1.2)
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    )


@pytest.mark.parametrize("curve", [pq, hlg])
def test_high_dynamic_range_looks_as_on_a_screen_without_it(curve, tmp_path, rng):
    """Greys of a scene whose white is reference white; read as they are, white would be a grey of 149 or 191."""
    from av.video.reformatter import ColorRange, Colorspace

    greys = torch.randint(256, (4, 6), generator=rng).numpy()
    greys[0, :2] = 0, 255
    light = np.where(greys <= 10, greys / 255 / 12.92, ((greys / 255 + 0.055) / 1.055) ** 2.4)
    signal = np.round(curve(light) * 65535).astype(np.uint16)
    signal = np.repeat(np.repeat(signal, 8, 0), 8, 1)[..., None].repeat(3, -1)
    frame = av.VideoFrame.from_ndarray(signal, format="rgb48le")
    frame = frame.reformat(format="yuv420p10le", dst_colorspace=Colorspace.BT2020, dst_color_range=ColorRange.MPEG)
    save_frame(tmp_path / "a.mkv", frame, "yuv420p10le", colorspace=9, color_range=1, color_primaries=9,
               color_trc=16 if curve is pq else 18)  # fmt: skip
    found = read(tmp_path / "a.mkv", signal)[4::8, 4::8]
    assert np.abs(found - greys[..., None]).max() <= 3


@pytest.mark.parametrize("mode", ["I;16", "L", "1", "CMYK"])
def test_pictures_of_other_depths(mode, tmp_path, rng):
    from PIL import Image

    grey = drawn(rng)[..., 0]
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")
    elif mode == "CMYK":
        Image.fromarray(grey).convert("RGB").convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    else:
        Image.fromarray(grey).convert(mode).save(tmp_path / "a.png")
        grey = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    found = read(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), grey)
    assert np.abs(found - grey[..., None]).max() <= (3 if mode == "CMYK" else 1)


@pytest.mark.parametrize("behind", ["nothing", "noise", "another"])
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "tiff", "avif"])
def test_a_picture_is_what_its_bytes_are(kind, behind, tmp_path, rng):
    """Whatever its name ends in, in a folder and in a shard, and whatever a phone has put behind it."""
    from PIL import Image

    picture, other = (drawn(rng, size=16) for _ in range(2))
    Image.fromarray(picture).save(tmp_path / f"a.{kind}")
    Image.fromarray(other).save(tmp_path / f"b.{kind}")
    more = {"nothing": b"", "noise": drawn(rng, 30, 40, 1).tobytes(), "another": (tmp_path / f"b.{kind}").read_bytes()}
    data = (tmp_path / f"a.{kind}").read_bytes() + more[behind]
    expected = read_frames(tmp_path / f"a.{kind}", 1, 32, 48)
    names = [f"x.{end}" for end in ("png", "JPG", "webp", "gif", "tif", "heic", "mp4", "bin", "y", "json")] + ["x"]
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for name in names:
            (tmp_path / name).write_bytes(data)
            shard.add(tmp_path / name, name)
    for path in (where / name for where in (tmp_path, tmp_path / "s.tar") for name in names):
        shape = probe(path)
        assert (shape.height, shape.width, shape.pictures) == (64, 96, 1), path
        assert torch.equal(read_frames(path, 1, 32, 48), expected), path


def test_a_film_of_jpegs_is_a_film(tmp_path):
    """By its name, which is all that tells it from a picture with another behind it."""
    from PIL import Image

    pictures = [numbered(3 * number, 32, 32) for number in range(5)]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.jpg", quality=95)
    data = b"".join((tmp_path / f"{number}.jpg").read_bytes() for number in range(5))
    (tmp_path / "a.mjpeg").write_bytes(data)
    (tmp_path / "a.jpg").write_bytes(data)
    assert [number_of(frame) for frame in read_frames(tmp_path / "a.mjpeg", 5, 32, 32)] == [0, 3, 6, 9, 12]
    assert [number_of(frame) for frame in read_frames(tmp_path / "a.jpg", 5, 32, 32)] == [0] * 5


def test_a_picture_that_is_written_anew_is_read_anew(tmp_path):
    from PIL import Image

    for number in (5, 40):
        Image.fromarray(numbered(number, 32 + number, 32)).save(tmp_path / "a.jpg")
        os.utime(tmp_path / "a.jpg", (number, number))
        assert number_of(read_frames(tmp_path / "a.jpg", 1, 16, 16)[0]) == number
