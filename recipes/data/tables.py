"""Tables of Arrow, in parquet and Arrow files, as the JSON objects that they stand for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from recipes.data.errors import DataError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["SUFFIXES", "batch_rows", "block_sizes", "read_block", "table_batches", "table_rows"]

SUFFIXES = (".parquet", ".arrow")
BATCH = 1024  # rows in memory at a time
FILE_MAGIC = b"ARROW1"
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def table_rows(path: str, ignored: Collection[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, from 1, object), streamed.

    A column that is null stays null. A key within an object that is null is left out: tables have each key in every row, and
    cannot tell such a null from a key that is not there.

    Args:
        ignored: columns that are left out where they hold what is no JSON.

    Raises:
        DataError: a file that is no such table, is cut off or has no rows; a value that JSON has no word for, with its row.
    """
    empty = True
    for first, batch in table_batches(path):
        for numbered in batch_rows(batch, first, path, ignored):
            empty = False
            yield numbered
    if empty:
        raise DataError(f"{path} has no rows")


def table_batches(path: str) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """(number of the first row, from 1, rows as they stand) of a table, up to `BATCH` at a time."""
    number = 0
    with _open(path) as batches:
        while True:
            with _reading(path, number):
                batch = next(batches, None)
            if batch is None:
                return
            yield number + 1, batch
            number += batch.num_rows


def batch_rows(
    batch: pyarrow.RecordBatch, first: int, path: str, ignored: Collection[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, from 1, object) of rows of a table. Arguments are what `table_batches` gives, and as `table_rows` has them."""
    for number, row in enumerate(_objects(batch, path, first - 1), first):
        yield number, _plain_row(row, ignored, f"{path}, row {number}")


@contextmanager
def _reading(path: str, number: int) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ArrowInvalid is a ValueError
        if isinstance(error, DataError):
            raise
        where = f"behind row {number}" if number else "at all"
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} cannot be read {where} ({reason}): it is cut off or no such file; make it anew"
        ) from error


@contextmanager
def _open(path: str) -> Iterator[Iterator[pyarrow.RecordBatch]]:
    try:
        file = open(path, "rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a file") from error
    with file:
        with _reading(path, 0):
            if path.endswith(".parquet"):
                from pyarrow.parquet import ParquetFile

                table = ParquetFile(file)
                schema, batches = table.schema_arrow, table.iter_batches(BATCH)
            else:
                schema, batches = _arrow(file, path)
        _check_names(schema.names, path)
        yield (piece for batch in batches for piece in _pieces(batch))


def _check_names(names: list[str], path: str) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} has several columns {twice[0]}: rename all but one")


def _arrow(file: Any, path: str) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    """An Arrow file, or a stream of them, as `datasets` writes."""
    from pyarrow import ipc

    magic = file.read(len(FILE_MAGIC))
    if magic == FILE_MAGIC:
        reader = ipc.open_file(file)
        return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    end = file.seek(0, 2)
    file.seek(max(end - len(STREAM_END), 0))
    if file.read() != STREAM_END:  # a stream cut between two batches reads as a shorter one
        raise DataError(f"{path} does not end as an Arrow stream does: it is cut off or no such file; make it anew")
    file.seek(0)
    reader = ipc.open_stream(file)
    return reader.schema, iter(reader)


def _pieces(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    return (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH))


def _objects(batch: pyarrow.RecordBatch, path: str, before: int) -> Iterator[dict[str, Any]]:
    """A batch's rows; where one cannot be converted, those before it."""
    try:
        yield from batch.to_pylist()
        return
    except ValueError:  # text that is not UTF-8, a time that Python has no object for, a key twice in a struct
        pass
    for i in range(batch.num_rows):
        try:
            (row,) = batch.slice(i, 1).to_pylist()
        except ValueError as error:
            raise DataError(f"{path}, row {before + i + 1}: {' '.join(str(error).split())[:200]}") from error
        yield row


def _plain_row(row: dict[str, Any], ignored: Collection[str], where: str) -> dict[str, Any]:
    found = {}
    for key, value in row.items():
        try:
            found[key] = _plain(value, key)
        except DataError as error:
            if key not in ignored:
                raise DataError(f"{where}: {error}, or name {key} in data.ignored_keys") from error
    return found


def _plain(value: Any, name: str) -> Any:
    """The value, if JSON has such a one."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        if math.isfinite(value):
            return value
        raise DataError(f"{name} is {value}, no number of JSON: write null where nothing is known")
    if kind is dict:
        return {key: _plain(item, f"{name}.{key}") for key, item in value.items() if item is not None}
    if kind is list:
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    said = "a map" if kind is tuple else {"bytes": "bytes", "Decimal": "a decimal"}.get(kind.__name__, "a time")
    raise DataError(f"{name} holds {said}, which JSON has no word for: write it as text or numbers")


def block_sizes(path: str) -> list[int]:
    """Rows of each piece of a table that can be read by itself: row groups of parquet, batches of Arrow. Reads no rows.

    Raises:
        DataError: a file that is no such table, is cut off or has no rows.
    """
    with _reading(path, 0):
        if path.endswith(".parquet"):
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path, memory_map=True) as table:
                _check_names(table.schema_arrow.names, path)
                sizes = [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
        else:
            batches = _mapped_batches(path)
            sizes = [batch.num_rows for batch in batches]
    if not sum(sizes):
        raise DataError(f"{path} has no rows")
    return sizes


def read_block(path: str, number: int) -> pyarrow.Table | pyarrow.RecordBatch:
    """A piece of `block_sizes`, by its number.

    Raises:
        DataError: it cannot be read.
    """
    with _reading(path, 0):
        if not path.endswith(".parquet"):
            return _mapped_batches(path)[number]
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path, memory_map=True) as table:
            return table.read_row_group(number)


def _mapped_batches(path: str) -> list[pyarrow.RecordBatch]:
    """Of an Arrow file or stream, which stays on the disk."""
    import pyarrow
    from pyarrow import ipc

    with open(path, "rb") as file:
        _arrow(file, path)  # raises where it was cut off
        file.seek(0)
        is_file = file.read(len(FILE_MAGIC)) == FILE_MAGIC
    source = pyarrow.memory_map(path)
    if is_file:
        reader = ipc.open_file(source)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        _check_names(reader.schema.names, path)
        return batches
    reader = ipc.open_stream(source)
    _check_names(reader.schema.names, path)
    return list(reader)
