"""Files and folders that are whole or not there: written beside their place, flushed to the disk, then given their name.

A kill at any moment leaves what was there before and perhaps something unfinished beside it. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["flush", "give_name", "json_text", "unfinished", "whole", "write_json", "write_whole"]


def unfinished(path: Path) -> Path:
    """Where a file or a folder is written before it gets its name."""
    path = path.absolute()  # "." has no name
    return path.with_name(path.name + ".unfinished")


def flush(path: Path) -> None:
    """A file, or a folder with everything in it, to the disk."""
    if path.is_dir():
        for inner in path.rglob("*"):
            _flush_one(inner)
    _flush_one(path)


def give_name(written: Path, path: Path) -> None:
    """Flush a file or a folder and rename it, so that the name cannot outlive what it names."""
    flush(written)
    os.replace(written, path)
    _flush_one(path.absolute().parent)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The place to write a file or make a folder that is `path` when all has gone well; after an error it is gone."""
    beside = unfinished(path)
    _remove(beside)  # of one that was killed
    try:
        yield beside
        give_name(beside, path)
    except BaseException:
        _remove(beside)
        raise


def write_whole(path: Path, text: str) -> None:
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """A file that any reader of JSON takes, see `json_text`."""
    write_whole(path, json_text(value, indent=1) + "\n")


def json_text(value: Any, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """JSON. It knows no NaN and no infinities: these are null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
