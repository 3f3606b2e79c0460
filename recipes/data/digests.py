"""Digests of what is read: whether rows and files are what they were, and which row is the first that is not.

XXH3, which finds accidents and edits, not forgeries. A file of many gigabytes is known by its length and by samples of it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from recipes.data.shards import opened

__all__ = ["RowsDigest", "digest_of", "row_digest", "rows_digest", "sampled_digest", "sampled_files"]

PARTS = 256
PART_DIGITS = 8
SAMPLE_BYTES = 4096
READERS = 16  # a shared filesystem answers many at a time


@dataclass(frozen=True)
class RowsDigest:
    """
    Attributes:
        rows: how many.
        whole: of all of them, in their order.
        parts: eight hexadecimal digits of each of up to 256 stretches of equal length, one after the other; "" where only the
            whole is known.
    """

    rows: int
    whole: str
    parts: str

    def first_difference(self, other: RowsDigest) -> range:
        """Numbers of the rows, from 0, among which the first one is that differs; of one length and not equal."""
        count = _num_parts(self.rows)
        for i in range(count):
            place = slice(i * PART_DIGITS, (i + 1) * PART_DIGITS)
            if self.parts[place] != other.parts[place]:
                break
        return range(i * self.rows // count, (i + 1) * self.rows // count)


def _num_parts(rows: int) -> int:
    return min(rows, PARTS)


def rows_digest(contents: Sequence[Any]) -> RowsDigest:
    """
    Args:
        contents: of every row what a run computes with: numbers, texts, and tuples and JSON objects of them.
    """
    return digest_of([row_digest(content) for content in contents])


def row_digest(content: Any) -> bytes:
    """Eight bytes of one row."""
    return xxhash.xxh3_64_digest(_encode(content))


def digest_of(digests: Sequence[bytes]) -> RowsDigest:
    """
    Args:
        digests: of each row, `row_digest`.
    """
    rows, whole, parts = len(digests), xxhash.xxh3_64(), []
    count = _num_parts(rows)
    for i in range(count):
        part = xxhash.xxh3_64(b"".join(digests[i * rows // count : (i + 1) * rows // count]))
        whole.update(part.digest())
        parts.append(part.hexdigest()[:PART_DIGITS])
    return RowsDigest(rows, whole.hexdigest(), "".join(parts))


def _encode(value: Any) -> bytes:
    """Bytes that no other value has."""
    if isinstance(value, (tuple, list)):
        try:
            return _framed(b"n", array("q", value).tobytes())
        except (TypeError, OverflowError):
            return _framed(b"l", b"".join(map(_encode, value)))
    return _framed(b"j", json.dumps(value, sort_keys=True).encode())


def _framed(kind: bytes, data: bytes) -> bytes:
    return kind + len(data).to_bytes(8, "little") + data


def sampled_files(paths: Iterable[str | Path]) -> dict[str, str]:
    """Of each file, `sampled_digest`."""
    names = list(dict.fromkeys(map(str, paths)))
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(sampled_digest, names), strict=True))


def sampled_digest(path: str | Path) -> str:
    """Of a file's length and its first, middle and last 4 KiB."""
    digest = xxhash.xxh3_64()
    with opened(path) as file:
        size = file.seek(0, 2)
        digest.update(size.to_bytes(8, "little"))
        for place in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
            file.seek(place)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
