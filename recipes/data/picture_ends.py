"""Where a still picture ends in its file, by its first bytes and its own headers, whatever the file is called.

Cameras put previews and films behind a JPEG's picture, and whoever sends files on puts anything behind any. A viewer shows the
picture; FFmpeg takes what follows for more pictures, unless the file's name ends as it expects.
"""

from __future__ import annotations

from os import SEEK_END
from typing import BinaryIO

__all__ = ["JPEG", "PNG", "jpeg_end", "picture_end", "png_end"]

JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"


def picture_end(file: BinaryIO) -> int | None:
    """Bytes of a JPEG, PNG or WebP up to its end; None: it is another file, or ends before that."""
    file.seek(0)
    head = file.read(12)
    if head[:3] == JPEG:
        return jpeg_end(head + file.read())
    if head[:8] == PNG:
        return png_end(file)
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        end = 8 + int.from_bytes(head[4:8], "little")
        return end if end <= file.seek(0, SEEK_END) else None
    return None


def jpeg_end(data: bytes) -> int | None:
    """Of a JPEG, up to the end marker that follows the picture; those of a preview in the header, and what a camera put behind,
    do not count."""
    at, scanning = 2, False
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker == 0xD9:
            return at + 2
        if scanning and (marker == 0 or 0xD0 <= marker <= 0xD7) or marker == 0xFF:
            at += 1 if marker == 0xFF else 2
            continue
        scanning = marker == 0xDA
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def png_end(file: BinaryIO) -> int | None:
    """Of a PNG, up to its last chunk: pictures of an animation may be missing without a trace otherwise."""
    at, size = len(PNG), file.seek(0, SEEK_END)
    while at + 12 <= size:  # length, kind, content, checksum
        file.seek(at)
        head = file.read(8)
        at += 12 + int.from_bytes(head[:4])
        if head[4:] == b"IEND":
            return at
    return None
