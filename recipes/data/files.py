"""Files of rows: JSONL, parquet and Arrow, one or a folder of them, each row with the place that it stands in.

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
from recipes.data.jsonl import numbered_rows
from recipes.data.tables import SUFFIXES, table_rows

__all__ = ["Place", "data_files", "existing_files", "placed_rows"]

JSONL = (".jsonl", ".jsonl.zst")
SPLIT = re.compile(r"(.+)-\d+-of-\d+\.\w+")  # as Hugging Face names the files of a split


@dataclass(frozen=True)
class Place:
    """A file, and the line of it or, in a table, the row, from 1."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}{', row ' if self.file.endswith(SUFFIXES) else ':'}{self.number}"


def placed_rows(path: str | Path, ignored: Collection[str] = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The rows of a file, of the files of a folder, or of those that a pattern such as `data/train-*.parquet` names, streamed.

    Args:
        ignored: columns that are left out where they hold what is no JSON.

    Raises:
        DataError: a file or row that cannot be read, with its place.
    """
    for file in data_files(path):
        read = table_rows(file, ignored) if file.endswith(SUFFIXES) else numbered_rows(file)
        for number, row in read:
            yield Place(file, number), row


def data_files(path: str | Path) -> list[str]:
    """The files that a path stands for: itself, those of a folder or of a pattern, in the order of their names.

    Of a folder, all that are of one kind, hidden ones (`.name`, `_name`) apart; what lies in folders within is not read.

    Raises:
        DataError: a folder or pattern without files, with files of several kinds, or of several splits of one data set.
    """
    path = str(path)
    if Path(path).is_dir():
        names = [p for p in sorted(Path(path).iterdir()) if p.is_file() and p.name[0] not in "._"]
        found = [str(p) for p in names if p.name.endswith(JSONL + SUFFIXES)]
        if not found:
            within = sorted(p.name for p in Path(path).iterdir() if p.is_dir() and p.name[0] not in "._")
            said = f"; it has the folders {', '.join(within[:8])}: name one of them" if within else ""
            raise DataError(f"{path} is a folder without {', '.join(JSONL + SUFFIXES)} files{said}")
        kinds = sorted({next(s for s in JSONL + SUFFIXES if name.endswith(s)) for name in found})
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
