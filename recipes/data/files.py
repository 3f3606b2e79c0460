"""Files of rows: JSONL, parquet, Arrow and shards, one or a folder of them, each row with the place that it stands in.

Tables are read as the JSON that they stand for: what JSON has no word for (a timestamp, bytes, a NaN) is refused with its row.
`datasets` would copy such files into a cache of its own and forget where a row came from.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.errors import DataError
from recipes.data.jsonl import line_chunks, numbered_rows, parsed_lines
from recipes.data.shards import PACKED, SUFFIX, shard_rows
from recipes.data.tables import SUFFIXES, batch_rows, table_batches, table_rows

__all__ = ["Chunk", "Place", "chunks", "data_files", "existing_files", "placed_rows"]

JSONL = (".jsonl", ".jsonl.zst")
ENDINGS = (*JSONL, *SUFFIXES, SUFFIX)
CHUNK_LINES = 1024
SPLIT = re.compile(r"(.+)-\d+-of-\d+\.\w+")  # as Hugging Face names the files of a split


@dataclass(frozen=True)
class Place:
    """A file, and the line of it or, in a table, the row, from 1; of a shard the number of the sample, and its key."""

    file: str
    number: int
    key: str = ""

    @property
    def folder(self) -> Path:
        """That the names of a row's files are relative to: its file's, or the shard itself."""
        return Path(self.file) if self.key else Path(self.file).parent

    def __str__(self) -> str:
        if self.key:
            return f"{self.file}, {self.key}"
        return f"{self.file}{', row ' if self.file.endswith(SUFFIXES) else ':'}{self.number}"


def placed_rows(
    path: str | Path, ignored: Collection[str] = ()
) -> Iterator[tuple[Place, dict[str, Any], tuple[str, ...]]]:
    """The rows of a file, of the files of a folder, or of those that a pattern such as `data/train-*.parquet` names, streamed;
    of a shard with the names of the files beside them.

    Args:
        ignored: columns that are left out where they hold what is no JSON.

    Raises:
        DataError: a file or row that cannot be read, with its place.
    """
    for file in data_files(path):
        if file.endswith(SUFFIX):
            for number, sample in enumerate(shard_rows(file), 1):
                yield Place(file, number, sample.key), sample.parsed(file), sample.media
            continue
        read = table_rows(file, ignored) if file.endswith(SUFFIXES) else numbered_rows(file)
        for number, row in read:
            yield Place(file, number), row, ()


@dataclass(frozen=True)
class Chunk:
    """Rows of a file as they stand, to be read elsewhere.

    Attributes:
        first: number of the first line, or row of a table, from 1.
        content: lines, or a batch of Arrow's.
    """

    file: str
    first: int
    content: Any

    def rows(self, ignored: Collection[str] = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
        """As `placed_rows`, without the files beside rows, of which there are none."""
        if isinstance(self.content, list):
            found = parsed_lines(self.content, self.first, self.file)
        else:
            found = batch_rows(self.content, self.first, self.file, ignored)
        for number, row in found:
            yield Place(self.file, number), row


def chunks(file: str) -> Iterator[Chunk]:
    """Of one file that is no shard, one behind the other."""
    found = table_batches(file) if file.endswith(SUFFIXES) else line_chunks(file, CHUNK_LINES)
    for first, content in found:
        yield Chunk(file, first, content)


def data_files(path: str | Path) -> list[str]:
    """The files that a path stands for: itself, those of a folder or of a pattern, in the order of their names.

    Of a folder, all that are of one kind, hidden ones (`.name`, `_name`) apart; what lies in folders within is not read.

    Raises:
        DataError: a folder or pattern without files, with files of several kinds, or of several splits of one data set; a
            shard that is packed.
    """
    found = _data_files(str(path))
    for file in found:
        if file.endswith(PACKED):
            raise DataError(f"{file} is packed: unpack it")
    return found


def _data_files(path: str) -> list[str]:
    if Path(path).is_dir():
        names = [p for p in sorted(Path(path).iterdir()) if p.is_file() and p.name[0] not in "._"]
        found = [str(p) for p in names if p.name.endswith((*ENDINGS, *PACKED))]
        if not found:
            within = sorted(p.name for p in Path(path).iterdir() if p.is_dir() and p.name[0] not in "._")
            said = f"; it has the folders {', '.join(within[:8])}: name one of them" if within else ""
            raise DataError(f"{path} is a folder without {', '.join(ENDINGS)} files{said}")
        kinds = sorted({next(s for s in (*ENDINGS, *PACKED) if name.endswith(s)) for name in found})
        if len(kinds) > 1:
            raise DataError(
                f"{path} is a folder of {' and '.join(kinds)} files, which may be the same rows twice: name one kind, as in "
                f"{path}/*{kinds[0]}"
            )
    elif not Path(path).exists() and any(c in path for c in "*?["):
        found = sorted(name for name in glob.glob(path) if Path(name).is_file())
        if not found:
            raise DataError(f"no file is named {path}: put the files there or mend the pattern")
    else:
        return [path]
    splits = sorted({match[1] for name in found if (match := SPLIT.fullmatch(Path(name).name))})
    if len(splits) > 1:
        raise DataError(
            f"{path} holds several splits, {', '.join(splits)}, which are not all to be trained on: name one, as in "
            f"{Path(found[0]).parent}/{splits[0]}-*"
        )
    return found


def existing_files(path: str | Path | None) -> list[str]:
    """Those of `data_files` that are there; none where it would raise."""
    try:
        return [] if path is None else [file for file in data_files(path) if Path(file).is_file()]
    except DataError:
        return []
