"""Films and pictures for tests, written with PyAV and Pillow; boxes of HEIF, which neither writes, by hand."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

MILLISECONDS = Fraction(1, 1000)
DESCRIPTIVE = (b"ispe", b"pixi", b"auxC")


def numbered(number: int, height: int = 16, width: int = 16) -> np.ndarray:
    """[height, width, 3] in the grey that says `number`, up to 62: in steps of 4, which lossy codecs keep apart."""
    return np.full((height, width, 3), 4 * number + 2, np.uint8)


def number_of(picture) -> int:
    """The number that a picture [3, h, w] says."""
    return round((float(picture.float().mean()) - 2) / 4)


def write_film(
    path: Path,
    pictures: Sequence[np.ndarray],
    stamps: Sequence[int] | None = None,
    *,
    codec: str,
    pix_fmt: str,
    rate: Fraction | int = 10,
    base: Fraction = MILLISECONDS,
    matrix: Sequence[int] | None = None,
    mux: dict[str, str] | None = None,
    encode: dict[str, str] | None = None,
    **context: int,
) -> None:
    """A film of rgb24 pictures [h, w, 3], at these ticks of `base`, or at a constant rate. `context`: of the codec."""
    with av.open(str(path), "w", options=mux or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=encode or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if stamps is not None:
            stream.time_base = stream.codec_context.time_base = base
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.shape[2] == 3 else "rgba")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def hevc_tile(picture: np.ndarray) -> tuple[bytes, bytes]:
    """(what hvcC holds, the coded picture) of rgb24 [h, w, 3], without loss beyond that of YUV."""
    file = io.BytesIO()
    with av.open(file, "w", format="hevc") as container:
        quiet = {"x265-params": "log-level=none:lossless=1:info=0"}
        stream = container.add_stream("libx265", rate=1, options=quiet)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv444p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])
    units = [unit for unit in re.split(b"\0*\0\0\1", file.getvalue()) if unit]
    headers = [unit for unit in units if unit[0] >> 1 in (32, 33, 34)]  # of the video, the sequence, the picture
    # By hand: FFmpeg's writer of hvcC refuses one such stream in twenty. Profile and level are left to the headers.
    config = bytes([1]) + bytes(15) + bytes([0xFF, 0xF8, 0xF8, 0, 0, 3, len(headers)])  # 4:4:4, 8 bits
    for unit in headers:
        config += struct.pack(">BHH", unit[0] >> 1, 1, len(unit)) + unit
    return config, b"".join(struct.pack(">I", len(unit)) + unit for unit in units if unit not in headers)


def av1_tile(picture: np.ndarray) -> tuple[bytes, bytes]:
    """(what av1C holds, the coded picture) of rgb24 [h, w, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "AVIF", quality=100, subsampling="4:4:4")
    file.seek(0)
    with av.open(file) as container:
        packet = next(container.demux(video=0))
        return container.streams.video[0].codec_context.extradata, bytes(packet)


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def full_box(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def shape_boxes(height: int, width: int) -> list[bytes]:
    """Size, and three channels of 8 bits."""
    return [full_box(b"ispe", 0, 0, struct.pack(">II", width, height)), full_box(b"pixi", 0, 0, b"\3\x08\x08\x08")]


class HeifFile:
    """Items, what belongs to them, and how they hang together; `save` writes them."""

    def __init__(self, brand: bytes):
        self.brand = brand
        self.items: list[tuple[bytes, bytes, list[bytes], bool]] = []  # kind, content, properties, hidden
        self.links: list[tuple[bytes, int, list[int]]] = []

    def add(self, kind: bytes, content: bytes, properties: Sequence[bytes], hidden: bool = False) -> int:
        self.items.append((kind, content, list(properties), hidden))
        return len(self.items)

    def add_coded(self, tile: tuple[bytes, bytes], height: int, width: int, *properties: bytes, hidden=False) -> int:
        kind, config = (b"hvc1", b"hvcC") if self.brand == b"heic" else (b"av01", b"av1C")
        return self.add(kind, tile[1], [box(config, tile[0]), *shape_boxes(height, width), *properties], hidden)

    def add_grid(
        self, tiles: Sequence[int], rows: int, columns: int, height: int, width: int, *properties: bytes
    ) -> int:
        content = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)
        item = self.add(b"grid", content, [*shape_boxes(height, width), *properties])
        self.links.append((b"dimg", item, list(tiles)))
        return item

    def save(self, path: Path, primary: int) -> None:
        """Grids' contents go into `idat`, the others into `mdat`."""
        head = box(b"ftyp", self.brand, bytes(4), b"mif1", self.brand)
        start = len(head) + len(self._meta(primary, 0)) + 8
        path.write_bytes(
            head + self._meta(primary, start) + box(b"mdat", *(x for kind, x, *_ in self.items if kind != b"grid"))
        )

    def _meta(self, primary: int, start: int) -> bytes:
        places, kinds, properties, owners, inside = b"", b"", [], b"", b""
        for number, (kind, content, own, hidden) in enumerate(self.items, 1):
            near = kind == b"grid"
            where = len(inside) if near else start
            places += struct.pack(">HHHHII", number, near, 0, 1, where, len(content))
            if near:
                inside += content
            else:
                start += len(content)
            kinds += full_box(b"infe", 2, hidden, struct.pack(">HH4s", number, 0, kind), b"\0")
            owners += struct.pack(">HB", number, len(own))
            for i, one in enumerate(own, len(properties) + 1):
                owners += bytes([i if one[4:8] in DESCRIPTIVE else i | 0x80])  # a reader must know the others
            properties += own
        count = struct.pack(">H", len(self.items))
        links = [
            box(kind, struct.pack(">HH", one, len(others)), *(struct.pack(">H", x) for x in others))
            for kind, one, others in self.links
        ]
        return full_box(
            b"meta", 0, 0,
            full_box(b"hdlr", 0, 0, struct.pack(">I4s12x", 0, b"pict"), b"\0"),
            full_box(b"pitm", 0, 0, struct.pack(">H", primary)),
            full_box(b"iloc", 1, 0, b"\x44\0", count, places),
            full_box(b"iinf", 0, 0, count, kinds),
            full_box(b"iref", 0, 0, *links),
            box(b"iprp", box(b"ipco", *properties), full_box(b"ipma", 0, 0, struct.pack(">I", len(self.items)), owners)),
            box(b"idat", inside),
        )  # fmt: skip
