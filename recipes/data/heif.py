"""Still pictures in HEIF boxes (HEIC of phones, AVIF): the picture that the file calls its own, put together.

A large picture is stored as a grid of tiles, beside previews, depth and alpha. FFmpeg hands over each of them as a stream
and the grid not at all (PyAV shows none of its groups of streams), so the boxes are read here; FFmpeg decodes the tiles.
Source: ISO/IEC 23008-12, ISO/IEC 14496-12 (boxes named as there).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_ext.errors import UserError
from recipes.data.containers import top_boxes
from recipes.data.pictures import blend, in_screen_colours, turn
from recipes.data.shards import opened

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.reformatter import VideoReformatter

__all__ = ["Layer", "Still", "draw_still", "read_still"]

ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", b"urn:mpeg:hevc:2015:auxid:1")
# What decodes to a picture by itself; each is a stream of FFmpeg with the item's number.
CODED = (b"hvc1", b"av01", b"avc1", b"jpeg", b"vvc1", b"j2k1")
QUARTER_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # of irot, against the clock
MIRRORS = ((1, 0, 0, -1), (-1, 0, 0, 1))  # of imir: top and bottom change places, left and right do


@dataclass(frozen=True)
class Layer:
    """Tiles, row by row, and the height and width that are cut out of them; None: one tile as it is."""

    tiles: tuple[int, ...]
    columns: int = 1
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Still:
    """The file's picture: its colours, how much of them is seen, and what is done to it, in this order."""

    colours: Layer
    alpha: Layer | None
    steps: tuple[tuple[bytes, bytes], ...]


def read_still(path: str | Path) -> Still | None:
    """The picture of a HEIF file; None for another file, and for a film in such boxes.

    Raises:
        UserError: a kind of picture that is not read, or boxes that make no sense.
    """
    with opened(path) as file:
        outer = {kind: (start, end) for kind, start, end in top_boxes(file)}

        def content(kind: bytes) -> bytes:
            start, end = outer[kind]
            file.seek(start)
            return file.read(end - start)

        if b"ftyp" not in outer or b"meta" not in outer:
            return None
        if b"moov" in outer:
            if re.search(rb"hdlr.{8}auxv", content(b"moov"), re.DOTALL):
                raise UserError("its transparency is a track of its own, which is not read")
            return None
        boxes = dict(_boxes(content(b"meta")[4:]))
        if b"pitm" not in boxes:
            return None
        try:
            return _Items(boxes, file).still()
        except (KeyError, IndexError) as error:
            raise UserError("its boxes do not say how its picture is stored") from error


def draw_still(container: InputContainer, still: Still, scaler: VideoReformatter) -> np.ndarray:
    """The picture as it is shown, as large as it is: uint8 [H, W, 3].

    Raises:
        UserError: FFmpeg has no picture for a tile, or the tiles do not fill the picture.
    """
    picture = _draw(container, still.colours, scaler)
    if still.alpha is not None:
        alpha = _draw(container, still.alpha, scaler)[..., :1]
        if alpha.shape[:2] != picture.shape[:2]:
            raise UserError("its alpha channel has another size than its picture")
        picture = blend(picture, alpha)
    for kind, value in still.steps:
        if kind == b"irot":
            picture = turn(picture, QUARTER_TURNS[value[0] & 3])
        elif kind == b"imir":
            picture = turn(picture, MIRRORS[value[0] & 1])
        else:
            picture = _crop(picture, value)
    return picture


def _draw(container: InputContainer, layer: Layer, scaler: VideoReformatter) -> np.ndarray:
    """uint8 [H, W, 3]; a tile is let go before the next is decoded."""
    streams = {stream.id: stream for stream in container.streams.video if stream.codec_context is not None}
    missing = [tile for tile in layer.tiles if tile not in streams]
    if missing:
        raise UserError(f"FFmpeg has no decoder for {len(missing)} of its {len(layer.tiles)} tiles")
    canvas, places = None, {tile: divmod(number, layer.columns) for number, tile in enumerate(layer.tiles)}
    container.seek(0)
    for packet in container.demux([streams[tile] for tile in places]):
        stream = packet.stream
        if not packet.size or stream.id not in places:
            continue
        stream.codec_context.thread_count = 1  # there may be a hundred tiles
        for frame in [*stream.decode(packet), *stream.decode(None)][:1]:
            tile = in_screen_colours(frame, scaler)
            height, width = tile.shape[:2]
            if canvas is None:
                rows = -(-len(layer.tiles) // layer.columns)
                canvas = np.empty((rows * height, layer.columns * width, 3), np.uint8)
            row, column = places.pop(stream.id)
            canvas[row * height : (row + 1) * height, column * width : (column + 1) * width] = tile
    if canvas is None or places:
        raise UserError(f"{len(places)} of its {len(layer.tiles)} tiles cannot be decoded")
    height, width = layer.size or canvas.shape[:2]
    if height > canvas.shape[0] or width > canvas.shape[1]:
        raise UserError(f"its tiles fill {canvas.shape[1]} x {canvas.shape[0]} pixels of {width} x {height}")
    return canvas[:height, :width]


def _crop(picture: np.ndarray, clap: bytes) -> np.ndarray:
    """The clean aperture: size and offset of its middle from the picture's, in fractions."""
    n = [int.from_bytes(clap[i : i + 4], signed=i >= 16) for i in range(0, 32, 4)]
    if not all(n[1::2]):
        raise UserError("its clean aperture makes no sense")
    width, height, right, down = (above / below for above, below in zip(n[::2], n[1::2], strict=True))
    left = round((picture.shape[1] - width) / 2 + right)
    top = round((picture.shape[0] - height) / 2 + down)
    found = picture[max(top, 0) : max(top + round(height), 0), max(left, 0) : max(left + round(width), 0)]
    if not found.size:
        raise UserError("its clean aperture lies outside the picture")
    return found


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of the boxes in a box."""
    at = 0
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4]) or len(data) - at
        if length < 8:
            return
        yield data[at + 4 : at + 8], data[at + 8 : at + length]
        at += length


class _Numbers:
    """Reads a box's content, field after field."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def next(self, size: int) -> int:
        """A number of `size` bytes.

        Raises:
            IndexError: the box ends before it.
        """
        if self.at + size > len(self.data):
            raise IndexError
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at])

    def version(self) -> int:
        return self.next(4) >> 24


class _Items:
    """What the boxes of `meta` say about the items of a file."""

    def __init__(self, boxes: dict[bytes, bytes], file):
        self.boxes, self.file = boxes, file
        self.kinds, self.links = dict(self._read_kinds()), list(self._read_links())
        self.owned = dict(self._read_properties())

    def still(self) -> Still:
        numbers = _Numbers(self.boxes[b"pitm"])
        item = numbers.next(4 if numbers.version() else 2)
        alphas = [one for kind, one, others in self.links if kind == b"auxl" and item in others and self._is_alpha(one)]
        steps = tuple(one for one in self.owned.get(item, []) if one[0] in (b"clap", b"irot", b"imir"))
        return Still(self._layer(item), self._layer(alphas[0]) if alphas else None, steps)

    def _is_alpha(self, item: int) -> bool:
        return any(kind == b"auxC" and value[4:].split(b"\0")[0] in ALPHA for kind, value in self.owned.get(item, []))

    def _layer(self, item: int) -> Layer:
        kind = self.kinds[item]
        if kind in CODED:
            return Layer((item,))
        if kind != b"grid":
            raise UserError(f"its picture is made of others in a way that is not read ({kind.decode('latin-1')!r})")
        grid = _Numbers(self._content(item))
        size = 4 if grid.next(2) & 1 else 2  # a version, then flags
        rows, columns = grid.next(1) + 1, grid.next(1) + 1
        width, height = grid.next(size), grid.next(size)
        tiles = {one: others for link, one, others in self.links if link == b"dimg"}[item]
        if len(tiles) != rows * columns or len(set(tiles)) != len(tiles):
            raise UserError(f"its grid of {rows} x {columns} has {len(set(tiles))} tiles")
        if any(self.kinds[tile] not in CODED for tile in tiles):
            raise UserError("its tiles are made of others")
        return Layer(tuple(tiles), columns, (height, width))

    def _read_kinds(self) -> Iterator[tuple[int, bytes]]:
        numbers = _Numbers(self.boxes[b"iinf"])
        start = 6 if numbers.version() == 0 else 8
        for kind, content in _boxes(self.boxes[b"iinf"][start:]):
            if kind == b"infe":
                entry = _Numbers(content)
                version = entry.version()
                item = entry.next(4 if version == 3 else 2)
                entry.next(2)
                yield item, content[entry.at : entry.at + 4]

    def _read_links(self) -> Iterator[tuple[bytes, int, list[int]]]:
        content = self.boxes.get(b"iref", bytes(4))
        size = 4 if content[0] else 2
        for kind, link in _boxes(content[4:]):
            numbers = _Numbers(link)
            yield kind, numbers.next(size), [numbers.next(size) for _ in range(numbers.next(2))]

    def _read_properties(self) -> Iterator[tuple[int, list[tuple[bytes, bytes]]]]:
        boxes = list(_boxes(self.boxes[b"iprp"]))
        properties = list(_boxes(dict(boxes)[b"ipco"]))
        for numbers in (_Numbers(content) for kind, content in boxes if kind == b"ipma"):
            head = numbers.next(4)
            size = 2 if head & 1 else 1
            for _ in range(numbers.next(4)):
                item = numbers.next(4 if head >> 24 else 2)
                chosen = [numbers.next(size) & (0x7FFF if size == 2 else 0x7F) for _ in range(numbers.next(1))]
                yield item, [properties[number - 1] for number in chosen if number]

    def _content(self, wanted: int) -> bytes:
        """What stands in an item, out of `idat` or the file."""
        numbers = _Numbers(self.boxes[b"iloc"])
        version = numbers.version()
        sizes = numbers.next(2)
        offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        for _ in range(numbers.next(4 if version == 2 else 2)):
            item = numbers.next(4 if version == 2 else 2)
            method = numbers.next(2) & 15 if version else 0
            numbers.next(2)
            base, found = numbers.next(base_size), b""
            for _ in range(numbers.next(2)):
                numbers.next(index_size if version else 0)
                place, length = base + numbers.next(offset_size), numbers.next(length_size)
                if item == wanted and method == 0:
                    self.file.seek(place)
                    found += self.file.read(length)
                elif item == wanted and method == 1:
                    found += self.boxes[b"idat"][place : place + length]
            if item == wanted:
                return found
        raise KeyError(wanted)
