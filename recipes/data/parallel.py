"""Rows to tokens in several processes. One reads the files and hands out stretches of them, in order; what comes back is in
order, too, and the first complaint is the one that a single process would have had."""

from __future__ import annotations

import logging
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

from megatron_ext.errors import UserError
from recipes.cli.children import die_with_parent, leave_signals
from recipes.data.files import Chunk, chunks
from recipes.data.reader import Rows, Seen
from recipes.data.rows import Reading
from recipes.data.stored import EncodedRows, encode_rows

__all__ = ["EncodedChunk", "encoded_chunks"]

AHEAD = 4  # stretches for each process that are read and not yet taken back


@dataclass(frozen=True)
class EncodedChunk:
    """
    Attributes:
        file: its number.
        notes: what reading had to say, for the log.
    """

    file: int
    rows: EncodedRows
    seen: Seen
    notes: tuple[str, ...]


def encoded_chunks(reading: Reading, files: list[str], processes: int) -> Iterator[EncodedChunk]:
    """All rows of these files, in order.

    Args:
        reading: what makes tokens of them; the processes are forked with it.

    Raises:
        UserError: a row, a file, or a process that was killed.
    """
    waiting: deque[Future[EncodedChunk]] = deque()
    found, failure = ((number, chunk) for number, file in enumerate(files) for chunk in chunks(file)), None
    with ProcessPoolExecutor(processes, get_context("fork"), _begin, (reading,)) as pool:
        try:
            while failure is None:
                try:
                    number, chunk = next(found)
                except StopIteration:
                    break
                except (UserError, OSError) as error:
                    failure = error
                    break
                waiting.append(pool.submit(_encode, chunk, number))
                if len(waiting) >= AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
            if failure is not None:  # what stands before it has come first
                raise failure
        except BrokenProcessPool as error:
            raise UserError(
                "a process that made tokens of rows was killed, or memory was short: lower data.token_processes"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


class _Notes(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.notes: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.notes.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        notes, self.notes = tuple(self.notes), []
        return notes


@dataclass
class _Worker:
    """What a process keeps."""

    reading: Reading
    rows: Rows
    notes: _Notes


_worker: _Worker | None = None


def _begin(reading: Reading) -> None:
    """In each process, once."""
    global _worker
    die_with_parent()  # what is left behind would hold the lock of whoever makes the tokens
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    leave_signals()
    os.environ["RANK"] = "0"  # what is said is said by all, and told once
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that a fork does not have
    _worker = _Worker(reading, reading.rows(), _Notes())
    logging.getLogger().handlers = [_worker.notes]


def _encode(chunk: Chunk, number: int) -> EncodedChunk:
    reading, rows = _worker.reading, _worker.rows
    found = (reading.read(rows, rows.read(*placed)) for placed in chunk.rows(rows.ignored))
    encoded = encode_rows([item for item in found if item is not None], number)
    return EncodedChunk(number, encoded, rows.take_seen(), _worker.notes.take())
