"""Whether a file is all there: what its own headers promise, against the bytes that it holds.

A download that stopped is often decoded without an error as far as it goes; only the header knows that there was more.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from os import SEEK_END
from pathlib import Path
from typing import BinaryIO

from recipes.data.picture_ends import JPEG, PNG, jpeg_end, png_end
from recipes.data.shards import opened

__all__ = ["missing_part", "top_boxes"]

# Top-level boxes whose bytes a film cannot do without. Others may be what a camera wrote behind it.
NEEDED = (b"moov", b"moof", b"mdat", b"meta")
FIRST = (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
SEGMENT = b"\x18\x53\x80\x67"  # of Matroska
# How a WMV begins, and the object that tells about the file.
ASF = (bytes.fromhex("3026B2758E66CF11A6D900AA0062CE6C"), bytes.fromhex("A1DCAB8C47A9CF118EE400C00C205365"))


def missing_part(path: str | Path) -> str | None:
    """What is missing of a file, "" where all that it promises is there, None for a file that says nothing about its length.

    For MP4 and its kin, Matroska and WebM, AVI and WMV, of which it reads headers only, and for JPEG, PNG and GIF.
    """
    with opened(path) as file:
        size = file.seek(0, SEEK_END)
        head = _at(file, 0, 12)
        if head[4:8] in FIRST:
            return _iso(file, size)
        if head[:4] == b"RIFF":
            return _riff(file, size)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _matroska(file, size)
        if head == ASF[0][:12]:
            return _asf(file, size)
        if head[:3] == JPEG:
            return "it ends before the end of its picture" if jpeg_end(_at(file, 0, size)) is None else ""
        if head[:8] == PNG:
            return "it ends before its last chunk" if png_end(file) is None else ""
        if head[:6] in (b"GIF87a", b"GIF89a"):
            return "" if _gif_ends(_at(file, 0, size)) else "it ends inside a picture"
    return None


def _iso(file: BinaryIO, size: int) -> str | None:
    """MP4 and its kin. Of fragments, more may be missing than the last."""
    kinds, end = set(), 0
    for kind, start, end in top_boxes(file):
        if kind in NEEDED and end > size:
            return _compare(size, end)
        if kind == bytes(4) and b"moof" in kinds:
            return _blank(start - 8, size)
        kinds.add(kind)
    return f"it ends {size - end} bytes into a fragment" if b"moof" in kinds and end < size else None


def top_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where its content begins, where it ends) of the outermost boxes of an ISO base media file."""
    size, at = file.seek(0, SEEK_END), 0
    while at + 8 <= size:
        head = _at(file, at, 16)
        length, kind, start = int.from_bytes(head[:4]), head[4:8], at + 8
        if length == 1 and len(head) == 16:  # the length stands behind the kind
            length, start = int.from_bytes(head[8:]), at + 16
        end = at + length if length else size  # 0: up to the end of the file
        if end < start:
            return
        yield kind, start, end
        at = end


def _at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _compare(held: int, promised: int) -> str:
    return f"it holds {held} of {promised} bytes" if held < promised else ""


def _blank(at: int, size: int) -> str:
    """Space that a download has set aside."""
    return f"nothing stands at byte {at} of {size}"


def _riff(file: BinaryIO, size: int) -> str | None:
    """AVI and WebP: chunks called RIFF, one behind the other. A recorder that was stopped leaves a length of 0, or all ones."""
    at = 0
    while (head := _at(file, at, 8))[:4] == b"RIFF" and len(head) == 8:
        (length,) = struct.unpack("<I", head[4:])
        if length in (0, 0xFFFFFFFF):
            return None
        at += 8 + length
        if at > size:
            return _compare(size, at)
        at += length & 1
    return ""


def _asf(file: BinaryIO, size: int) -> str | None:
    """WMV: its length stands in an object of the header."""
    header = _at(file, 0, 1 << 16)
    at = header.find(ASF[1])
    found = header[at + 40 : at + 92] if at >= 0 else b""
    if len(found) < 52 or found[48] & 1:  # a broadcast
        return None
    return _compare(size, int.from_bytes(found[:8], "little"))


def _matroska(file: BinaryIO, size: int) -> str | None:
    """The header, then one segment full of elements. Live recordings do not know their length."""
    at, promised = 0, None
    while at < (size if promised is None else promised):
        head = _at(file, at, 12)
        if not head[0]:  # no element begins so
            return _blank(at, size)
        width = 9 - head[0].bit_length()  # of the name, 1 to 4 bytes
        if width > 4 or len(head) <= width or not head[width]:
            return None
        more = 9 - head[width].bit_length()  # of the length, 1 to 8 bytes
        length = int.from_bytes(head[width : width + more]) & (1 << 7 * more) - 1
        if length == (1 << 7 * more) - 1:
            return None
        at += width + more
        if promised is not None or head[:4] != SEGMENT:
            at += length
        elif at + length > size:
            return _compare(size, at + length)
        else:
            promised = at + length
    return ""


def _gif_ends(data: bytes) -> bool:
    """Whether every block that begins also ends. The trailer may be missing: viewers do not need it."""

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    at = 13 + table(data[10]) if len(data) > 12 else len(data) + 1
    while at < len(data) and data[at] in b"!,":
        if data[at] == 0x21:  # an extension, its kind, then pieces
            at += 2
        else:  # a picture: place, size and flags, colours, code size, then pieces
            if at + 9 >= len(data):
                return False
            at += 11 + table(data[at + 9])
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return at <= len(data)
