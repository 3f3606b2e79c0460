"""Clips decoded ahead, by other processes, while a step is computed.

A process decodes one clip at a time and hands its frames over; what fails is raised where the clip is used, as if it had been
decoded there.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megatron_ext.errors import UserError
from recipes.data.errors import VideoError

if TYPE_CHECKING:
    import numpy as np

    from recipes.data.clips import Clip

__all__ = ["DecodeAhead"]

logger = logging.getLogger(__name__)

LOST = "a process that decodes clips ahead has ended: is memory short? set data.video.workers lower, 0 for none"


class HasMedia(Protocol):
    media: tuple[Clip, ...]


class DecodeAhead:
    """Reads what the next batch shows.

    Args:
        workers: processes; 0: nothing is read ahead. They start when there is first something to read.
        rows: of the run.
        order: which of them come next: what a checkpoint keeps. It is asked through a copy. None: `ask` says.
        own: (order) -> the numbers of those of its next rows that this rank computes with; None: `order.next()`.
    """

    def __init__(
        self,
        workers: int,
        rows: Sequence[HasMedia] = (),
        order: Any = None,
        own: Callable[[Any], Sequence[int]] | None = None,
    ):
        self.workers, self.rows, self.order, self.own = workers, rows, order, own or (lambda order: order.next())
        self._pool: ProcessPoolExecutor | None = None
        self._end: Finalize | None = None

    @classmethod
    def of(cls, video: Any, *what: Any) -> DecodeAhead:
        """
        Args:
            video: `data.video`, or None.
        """
        return cls(video.workers if video is not None else 0, *what)

    def next_batch(self) -> None:
        """Begin to read what the batch that is drawn next will show."""
        if self.workers:
            try:
                self.ask(self.own(copy.copy(self.order)))
            except UserError:  # the run ends with the batch before
                return

    def ask(self, numbers: Sequence[int]) -> None:
        """Begin to read what these rows show."""
        if self.workers:
            from recipes.data.clips import read_ahead

            read_ahead([clip for number in numbers for clip in self.rows[number].media], self._read)

    def close(self) -> None:
        """End the processes, and wait for them. Left to the interpreter's own end, ranks have waited for them for ever."""
        if self._pool is not None:
            self._end.cancel()
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._end = None

    def _read(self, clip: Clip) -> Future[torch.Tensor]:
        if self._pool is None:
            # Not forked: CUDA and threads survive no fork.
            self._pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), _begin)
            # A rank that multiprocessing has started waits for its children when it ends, before the pool would end them.
            how = {"wait": False, "cancel_futures": True}
            self._end = Finalize(self, ProcessPoolExecutor.shutdown, (self._pool,), how, exitpriority=100)
            logger.info("%d processes decode the clips of the next step", self.workers)
        try:
            with _without_main():  # one starts with each of the first clips
                coming = self._pool.submit(_pixels, clip)
        except BrokenProcessPool as error:
            raise VideoError(f"{clip.where}: {LOST}") from error
        return _as_tensor(coming, clip.where)


def _as_tensor(coming: Future[tuple[np.ndarray, torch.dtype]], where: str) -> Future[torch.Tensor]:
    found: Future = Future()

    def done(before: Future) -> None:
        try:
            numbers, dtype = before.result()
            found.set_result(torch.from_numpy(numbers).view(dtype))
        except BrokenProcessPool:
            found.set_exception(VideoError(f"{where}: {LOST}"))
        except BaseException as error:  # noqa: BLE001  whoever waits for it is told
            found.set_exception(error)

    coming.add_done_callback(done)
    return found


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start do not import the script that this one runs, with all that training needs."""
    main = sys.modules["__main__"]
    kept = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(kept)


# In the process.


def _begin() -> None:
    for number in (
        signal.SIGINT,
        signal.SIGUSR1,
        signal.SIGTERM,
    ):  # they go to all of a job; this one ends with its run
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(0)


def _pixels(clip: Clip) -> tuple[np.ndarray, torch.dtype]:
    """As bytes: NumPy has no bfloat16."""
    found = clip.read().contiguous()
    return found.view(torch.uint8).numpy(), found.dtype
