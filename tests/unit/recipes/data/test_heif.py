"""HEIC and AVIF: the whole picture, never one of its tiles, a preview or another item, or one line that says why not."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from recipes.data.errors import VideoError
from recipes.data.frames import read_frames
from tests.media_files import HeifFile, av1_tile, box, full_box, hevc_tile

TILE = 64
KINDS = {"heic": (b"heic", hevc_tile), "avif": (b"avif", av1_tile)}
kinds = pytest.mark.parametrize("kind", KINDS)


def integer(low: int, high: int, rng) -> int:
    return int(torch.randint(low, high + 1, (), generator=rng))


def squares(height: int, width: int, rng) -> np.ndarray:
    drawn = torch.randint(256, (-(-height // 8), -(-width // 8), 3), generator=rng, dtype=torch.uint8).numpy()
    return np.repeat(np.repeat(drawn, 8, 0), 8, 1)[:height, :width]


def add_grid(file: HeifFile, encode, picture: np.ndarray, *properties: bytes) -> int:
    height, width = picture.shape[:2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    padded = np.zeros((rows * TILE, columns * TILE, 3), np.uint8)
    padded[:height, :width] = picture
    places = [(y, x) for y in range(0, rows * TILE, TILE) for x in range(0, columns * TILE, TILE)]
    tiles = [file.add_coded(encode(padded[y : y + TILE, x : x + TILE]), TILE, TILE, hidden=True) for y, x in places]
    return file.add_grid(tiles, rows, columns, height, width, *properties)


def read(path, like: np.ndarray) -> np.ndarray:
    return read_frames(path, 1, *like.shape[:2])[0].permute(1, 2, 0).numpy().astype(int)


@kinds
def test_a_grid_is_put_together_and_turned(kind, tmp_path, rng):
    """Of any number of tiles, the last ones cut; turned against the clock, then mirrored, as the file says."""
    brand, encode = KINDS[kind]
    for _ in range(3):
        picture = squares(2 * integer(17, 64, rng), 2 * integer(17, 80, rng), rng)
        turns, axis = integer(0, 3, rng), integer(0, 2, rng)
        properties = [box(b"irot", bytes([turns])), *([box(b"imir", bytes([axis]))] if axis < 2 else [])]
        file = HeifFile(brand)
        file.save(tmp_path / f"a.{kind}", add_grid(file, encode, picture, *properties))
        expected = np.rot90(picture, turns)
        expected = expected if axis == 2 else expected[::-1] if axis == 0 else expected[:, ::-1]
        assert np.abs(read(tmp_path / f"a.{kind}", expected) - expected).max() <= 3
        if kind == "avif":  # what others make of it
            from PIL import Image, ImageOps

            other = ImageOps.exif_transpose(Image.open(tmp_path / "a.avif")).convert("RGB")
            assert np.abs(read(tmp_path / "a.avif", expected) - np.asarray(other)).max() <= 2


@kinds
def test_a_clean_aperture_is_cut_out(kind, tmp_path, rng):
    brand, encode = KINDS[kind]
    picture = squares(96, 120, rng)
    left, top = 2 * integer(0, 8, rng), 2 * integer(0, 8, rng)  # of a window of 100 x 80
    middle = (2 * left + 100 - 120, 2, 2 * top + 80 - 96, 2)  # from the picture's, in halves
    clap = box(b"clap", struct.pack(">IIIIiIiI", 100, 1, 80, 1, *middle))
    file = HeifFile(brand)
    file.save(tmp_path / f"a.{kind}", add_grid(file, encode, picture, clap))
    expected = picture[top : top + 80, left : left + 100]
    assert np.abs(read(tmp_path / f"a.{kind}", expected) - expected).max() <= 3


@kinds
@pytest.mark.parametrize("grid", [True, False])
def test_a_preview_is_never_the_picture(kind, grid, tmp_path, rng):
    """First in the file, last, or one of two."""
    brand, encode = KINDS[kind]
    picture, preview = squares(TILE, TILE, rng), squares(TILE, TILE, rng)
    file = HeifFile(brand)
    small = file.add_coded(encode(preview), TILE, TILE)
    primary = add_grid(file, encode, picture) if grid else file.add_coded(encode(picture), TILE, TILE)
    file.links.append((b"thmb", small, [primary]))
    file.save(tmp_path / f"a.{kind}", primary)
    assert np.abs(read(tmp_path / f"a.{kind}", picture) - picture).max() <= 3


@kinds
def test_its_alpha_is_an_item_of_its_own(kind, tmp_path, rng):
    brand, encode = KINDS[kind]
    picture, alpha = squares(TILE, TILE, rng), squares(TILE, TILE, rng)[..., :1]
    file = HeifFile(brand)
    primary = add_grid(file, encode, picture, box(b"irot", b"\1"))
    urn = full_box(b"auxC", 0, 0, b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0")
    mask = file.add_coded(encode(alpha.repeat(3, -1)), TILE, TILE, urn)
    depth = file.add_coded(
        encode(squares(TILE, TILE, rng)), TILE, TILE, full_box(b"auxC", 0, 0, b"urn:example:depth\0")
    )
    file.links += [(b"auxl", depth, [primary]), (b"auxl", mask, [primary])]
    file.save(tmp_path / f"a.{kind}", primary)
    share = alpha / 255
    expected = np.rot90(picture * share + 255 * (1 - share))
    assert np.abs(read(tmp_path / f"a.{kind}", expected) - expected).max() <= 4


def overlay(file: HeifFile, tile: tuple[bytes, bytes]) -> int:
    item = file.add(b"iovl", bytes(20), [])
    file.links.append((b"dimg", item, [file.add_coded(tile, TILE, TILE)]))
    return item


def too_few_tiles(file: HeifFile, tile: tuple[bytes, bytes]) -> int:
    return file.add_grid([file.add_coded(tile, TILE, TILE)], 1, 2, TILE, 2 * TILE)


def too_small_tiles(file: HeifFile, tile: tuple[bytes, bytes]) -> int:
    tiles = [file.add_coded(tile, TILE, TILE) for _ in range(2)]
    return file.add_grid(tiles, 1, 2, TILE, 2 * TILE + 2)


def a_broken_tile(file: HeifFile, tile: tuple[bytes, bytes]) -> int:
    tiles = [file.add_coded((tile[0], data), TILE, TILE) for data in (tile[1], bytes(len(tile[1])))]
    return file.add_grid(tiles, 1, 2, TILE, 2 * TILE)


def no_such_item(file: HeifFile, tile: tuple[bytes, bytes]) -> int:
    return file.add_coded(tile, TILE, TILE) + 7


def an_empty_aperture(file: HeifFile, tile: tuple[bytes, bytes]) -> int:
    return file.add_coded(tile, TILE, TILE, box(b"clap", struct.pack(">8I", 9, 0, 9, 1, 0, 1, 0, 1)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (overlay, r"its picture is made of others in a way that is not read \('iovl'\)"),
        (too_few_tiles, "its grid of 1 x 2 has 1 tiles"),
        (too_small_tiles, "its tiles fill 128 x 64 pixels of 130 x 64"),
        (a_broken_tile, "Invalid data|1 of its 2 tiles cannot be decoded"),
        (no_such_item, "its boxes do not say how its picture is stored"),
        (an_empty_aperture, "its clean aperture makes no sense"),
    ],
)
def test_what_cannot_be_put_together_is_refused(make, words, tmp_path, rng):
    file = HeifFile(b"heic")
    file.save(tmp_path / "a.heic", make(file, hevc_tile(squares(TILE, TILE, rng))))
    with pytest.raises(VideoError, match=f"^rows.jsonl:5: cannot decode .*a.heic: ({words})") as caught:
        read_frames(tmp_path / "a.heic", 2, 16, 16, "rows.jsonl:5")
    assert "\n" not in str(caught.value)


def test_boxes_cut_anywhere_are_one_line(tmp_path, rng):
    file = HeifFile(b"heic")
    primary = add_grid(file, hevc_tile, squares(TILE, 2 * TILE, rng))
    file.save(tmp_path / "a.heic", primary)
    whole = (tmp_path / "a.heic").read_bytes()
    for _ in range(10):
        (tmp_path / "a.heic").write_bytes(whole[: integer(20, len(whole) - 1, rng)])
        with pytest.raises(VideoError, match="^rows.jsonl:6: .*a.heic"):
            read_frames(tmp_path / "a.heic", 1, 16, 16, "rows.jsonl:6")


def test_an_animation_is_a_film_and_not_its_first_picture(tmp_path):
    from PIL import Image

    greys = [Image.fromarray(np.full((32, 32, 3), grey, np.uint8)) for grey in (10, 100, 200)]
    greys[0].save(tmp_path / "a.avif", save_all=True, append_images=greys[1:], duration=100)
    found = read_frames(tmp_path / "a.avif", 3, 16, 16).float().mean((1, 2, 3))
    assert (found - torch.tensor([10.0, 100, 200])).abs().max() <= 2
    clear = [grey.convert("RGBA") for grey in greys]
    clear[1].putalpha(0)
    clear[0].save(tmp_path / "b.avif", save_all=True, append_images=clear[1:], duration=100)
    with pytest.raises(VideoError, match="b.avif: its transparency is a track of its own, which is not read"):
        read_frames(tmp_path / "b.avif", 3, 16, 16)


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_animations_keep_their_times(kind, tmp_path):
    """The last picture's time counts, too. FFmpeg reads no animated WebP: one line."""
    from PIL import Image

    greys = [Image.fromarray(np.full((32, 32, 3), grey, np.uint8)) for grey in (10, 100, 200)]
    greys[0].save(
        tmp_path / f"a.{kind}", save_all=True, append_images=greys[1:], duration=[300, 100, 600], lossless=True
    )
    if kind == "webp":
        with pytest.raises(VideoError, match="cannot decode .*a.webp: Invalid data"):
            read_frames(tmp_path / "a.webp", 5, 16, 16)
        return
    found = read_frames(tmp_path / f"a.{kind}", 5, 16, 16).float().mean((1, 2, 3))
    assert (found - torch.tensor([10.0, 100, 200, 200, 200])).abs().max() <= 1  # at 100, 300, 500, 700 and 900 ms
