"""Where the rows of files stand, so that a few can be read without the others: stretches of lines, row groups, batches, samples.

A row is a line, a row of a table, or a sample of a shard; a line may be blank, which only shows when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.errors import DataError
from recipes.data.files import Place
from recipes.data.jsonl import parsed_lines
from recipes.data.shards import SUFFIX, read_samples, sample_blocks
from recipes.data.tables import SUFFIXES, batch_rows, block_sizes, read_block

__all__ = ["RowBlock", "RowBlocks", "find_blocks"]

LINES = 1024  # of a block
READ_BYTES = 1 << 24
NEWLINE = 10


class BlockColumn(IntEnum):
    """Columns of the table of blocks."""

    FILE = 0  # its number
    BEGIN = 1  # of lines, the byte; of a table or shard, the number of the block in it
    BYTES = 2  # of lines
    FIRST = 3  # number of the first line or row, from 1
    ROWS = 4


@dataclass(frozen=True)
class RowBlock:
    """Rows in memory, as they stand.

    Attributes:
        first: number of the first, from 1.
        content: lines, samples, or a table of Arrow's.
    """

    file: str
    first: int
    content: Any

    def row(self, number: int, ignored: Collection[str]) -> tuple[Place, dict[str, Any], tuple[str, ...]] | None:
        """A row, by its number in the block, from 0, and the files that stand beside it in a shard; None: a blank line."""
        line = self.first + number
        if self.file.endswith(SUFFIX):
            sample = self.content[number]
            return Place(self.file, line, sample.key), sample.parsed(self.file), sample.media
        if isinstance(self.content, list):
            found = parsed_lines(self.content[number : number + 1], line, self.file)
        else:
            found = batch_rows(self.content.slice(number, 1), line, self.file, ignored)
        for at, row in found:
            return Place(self.file, at), row, ()
        return None


@dataclass(frozen=True)
class RowBlocks:
    """
    Attributes:
        files: their names.
        parts: int64 [blocks, 5].
    """

    files: Sequence[str]
    parts: np.ndarray

    @property
    def sizes(self) -> list[int]:
        """Rows of each block."""
        return self.parts[:, BlockColumn.ROWS].tolist()

    def read(self, number: int) -> RowBlock:
        """
        Raises:
            DataError: the file cannot be read, or has become shorter.
        """
        number, begin, size, first, rows = self.parts[number].tolist()
        file = self.files[number]
        if file.endswith(SUFFIXES):
            return RowBlock(file, first, read_block(file, begin))
        if file.endswith(SUFFIX):
            return RowBlock(file, first, read_samples(file, first, rows))
        try:
            with open(file, "rb") as opened:
                opened.seek(begin)
                data = opened.read(size)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from error
        lines = data.split(b"\n")
        lines = lines if lines[-1] else lines[:-1]
        if len(data) != size or len(lines) != rows:
            raise DataError(
                f"{file} has been changed since the run began: lines {first} and behind are not where they were"
            )
        return RowBlock(file, first, lines)


def find_blocks(files: Sequence[str], tell: Callable[[str], None]) -> np.ndarray:
    """The table of blocks, int64 [blocks, 5].

    Args:
        tell: is told how far it is.

    Raises:
        DataError: a file that cannot be read, has no rows, or whose rows cannot be found without unpacking it.
    """
    parts: list[tuple[int, ...]] = []
    for number, file in enumerate(files):
        if file.endswith(".zst"):
            raise DataError(f"data.streaming reads files here and there, and {file} is packed: unpack it")
        if file.endswith(SUFFIXES):
            first = 1
            for block, rows in enumerate(block_sizes(file)):
                if rows:
                    parts.append((number, block, 0, first, rows))
                first += rows
        elif file.endswith(SUFFIX):
            parts += [(number, *part) for part in sample_blocks(file)]
        else:
            parts += [(number, *part) for part in _lines(file)]
        tell(f"{number + 1} of {len(files)} files")
    return np.array(parts, np.int64).reshape(-1, len(BlockColumn))


def _lines(file: str) -> list[tuple[int, int, int, int]]:
    """(byte, bytes, first line, lines) of stretches of lines."""
    if Path(file).is_dir():
        raise DataError(f"{file} is a folder: name a JSONL file")
    ends = [np.zeros(0, np.int64)]  # behind each `LINES`-th line
    lines = at = 0
    try:
        with open(file, "rb", buffering=0) as opened:
            last = NEWLINE
            while data := opened.read(READ_BYTES):
                found = np.flatnonzero(np.frombuffer(data, np.uint8) == NEWLINE)
                ends.append(found[(LINES - 1 - lines) % LINES :: LINES] + at + 1)
                lines += len(found)
                at += len(data)
                last = data[-1]
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; name a JSONL file") from error
    if not at:
        raise DataError(f"{file} is empty: it needs one JSON object on each line")
    lines += last != NEWLINE
    begins = [0, *np.concatenate(ends).tolist()]
    stops = [*begins[1:], at]
    return [
        (begin, stop - begin, 1 + i * LINES, min(LINES, lines - i * LINES))
        for i, (begin, stop) in enumerate(zip(begins, stops, strict=True))
        if stop > begin
    ]
