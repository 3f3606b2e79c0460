"""JSON in, strictly: the objects of a JSONL file with their lines, and JSON text that stands in a string.

JSON as its standard has it: NaN and Infinity are refused, and so are a key that an object has twice and a number that a
float cannot hold, of which Python would silently keep the last one and infinity.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from recipes.data.errors import DataError

__all__ = ["check_text", "kind", "line_chunks", "numbered_rows", "parse_json", "parsed_lines", "read_jsonl"]

CHUNK_BYTES = 1 << 20


def numbered_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object), streamed; a file whose name ends in .zst is unpacked."""
    empty = True
    for first, lines in line_chunks(path, 1):
        for numbered in parsed_lines(lines, first, path):
            empty = False
            yield numbered
    if empty:
        raise DataError(f"{path} is empty: it needs one JSON object on each line")


def line_chunks(path: str | Path, size: int) -> Iterator[tuple[int, list[bytes]]]:
    """(number of the first line, from 1, lines as they stand) of a file, so many lines or `CHUNK_BYTES` at a time."""
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder: name a JSONL file")
    try:
        file = open(path, "rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a JSONL file") from error
    with file:
        first, lines, held = 1, [], 0
        for raw in _lines(file, path):
            lines.append(raw)
            held += len(raw)
            if len(lines) == size or held >= CHUNK_BYTES:
                yield first, lines
                first, lines, held = first + len(lines), [], 0
        if lines:
            yield first, lines


def parsed_lines(lines: list[bytes], first: int, path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of lines that are not blank.

    Args:
        first: number of the first of these lines, from 1.
    """
    for line, raw in enumerate(lines, first):
        if row := _parse(raw, f"{path}:{line}", first=line == 1):
            yield line, row[0]


def _lines(file: BinaryIO, path: str | Path) -> Iterator[bytes]:
    """Of a file, or of what a file whose name ends in .zst holds."""
    if not str(path).endswith(".zst"):
        yield from file
        return
    import pyarrow

    try:
        yield from io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} cannot be unpacked to its end ({error}): it is no zstd file, or cut off; make it anew"
        ) from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are skipped."""
    return [row for _, row in numbered_rows(path)]


def _parse(raw: bytes, where: str, first: bool) -> tuple[dict[str, Any]] | None:
    """The line's object, or None for a blank line."""
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1}: {error.reason}); convert the file") from error
    if not text:
        return None
    if text[0] == "\ufeff":
        raise DataError(f"{where}: begins with a byte order mark, as where files were joined; remove it")
    try:
        row = parse_json(text)
    except DataError as error:
        raise DataError(f"{where}: {error}; each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: {kind(row)} where a JSON object is needed, such as {{"prompt": ...}}')
    return (row,)


def parse_json(text: str) -> Any:
    """
    Raises:
        DataError: what is wrong with it, without saying where it stands.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{error.msg} at column {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets of thousands of levels
        raise DataError(str(error)) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {twice!r} stands twice in one object")
    return found


def _float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise DataError(f"the number {text[:40]} is too large")
    return number


def _constant(text: str) -> None:
    raise DataError(f"{text} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)


def check_text(text: Any, name: str, where: str) -> str:
    """The text, if a tokenizer can read it."""
    if not isinstance(text, str):
        remedy = "; a conversation goes under messages" if name == "prompt" and isinstance(text, list) else ""
        raise DataError(f"{where}: {name} must be a string, got {kind(text)}{remedy}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name} holds half of a surrogate pair (\\ud800-\\udfff); repair the text") from None
    return text


def kind(value: Any) -> str:
    """What JSON calls such a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
