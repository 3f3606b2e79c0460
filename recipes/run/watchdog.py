"""A run that hangs says where, and ends: a thread on each rank sees whether any rank goes on.

Where one rank hangs, in an environment or a disk, the others soon wait for it in a collective, for torch's 30 minutes. A rank
that merely waits for a slower one must not end the run, so ranks tell each other how far they are, through the store by which
they met: only where none of them has done anything for `trainer.health.hang_seconds` does the run end.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_ext.errors import of_system
from megatron_ext.runtime.progress import PROGRESS

__all__ = ["HEARTBEAT", "Watchdog"]

logger = logging.getLogger(__name__)

HEARTBEAT = "heartbeat.json"
PAUSE = 10.0  # seconds between looks, and between heartbeats
GRACE = 3.0  # seconds for other ranks to tell the same, once they have looked
NAMED = 16  # ranks whose places are told in one line
KEY = "megatron_ext/progress/"


class Watchdog:
    """Watches from when it is made until it is closed.

    Args:
        folder: of the run; `HEARTBEAT` is written there by rank 0, and stacks by every rank that hangs.
        seconds: without progress of any rank; None: only heartbeats.
    """

    def __init__(self, folder: Path, seconds: float | None):
        self._folder, self._seconds, self._rank = folder, seconds, dist.get_rank()
        self._pause = PAUSE if seconds is None else min(PAUSE, seconds / 4)
        self._main = threading.main_thread().ident
        store = _get_default_store()
        # A connection to the store serves one call at a time, and the main thread may be in one for long.
        self._store = store.clone() if dist.get_world_size() > 1 else store
        self._seen: dict[int, str] = {}
        self._since = time.monotonic()
        self._end = threading.Event()
        self._said = False  # that a heartbeat could not be written
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while not self._end.wait(self._pause):
                self._look()
        except Exception:  # a store that is gone: the run itself must not end for it
            logger.exception("nobody watches this run any more")
        if self._rank == 0 and self._end.is_set():
            self._beat("ended")

    def _look(self) -> None:
        if PROGRESS.is_bounded:
            PROGRESS.made()
        mine = self._place()
        self._note(self._rank, mine)
        if self._rank == 0:
            self._beat(PROGRESS.phase)
        if self._seconds is None:
            return
        self._store.set(f"{KEY}{self._rank}", mine)
        idle = time.monotonic() - self._since
        if idle > self._seconds / 2:
            for rank, place in self._others():
                self._note(rank, place)
        if time.monotonic() - self._since > self._seconds and not self._end.is_set():
            self._end_the_run()

    def _note(self, rank: int, place: str) -> None:
        """The count at its beginning tells progress; a place alone may change while nothing is done."""
        if rank not in self._seen or self._seen[rank].split(" ")[0] != place.split(" ")[0]:
            self._since = time.monotonic()
        self._seen[rank] = place

    def _others(self) -> Iterator[tuple[int, str]]:
        for rank in range(dist.get_world_size()):
            if rank != self._rank and self._store.check([f"{KEY}{rank}"]):
                yield rank, self._store.get(f"{KEY}{rank}").decode()

    def _place(self) -> str:
        """What this rank has done, and where its main thread is: the innermost line that is not a library's."""
        frame = sys._current_frames().get(self._main)
        inner, where = frame, None
        while frame is not None and where is None:
            where = (
                frame
                if "site-packages" not in (name := frame.f_code.co_filename) and "/lib/python" not in name
                else None
            )
            frame = frame.f_back
        where = where or inner
        line = (
            "" if where is None else f" ({Path(where.f_code.co_filename).name}:{where.f_lineno} {where.f_code.co_name})"
        )
        return f"{PROGRESS.count} {PROGRESS.phase}{line}"

    def _beat(self, phase: str) -> None:
        beat = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": PROGRESS.step, "phase": phase, "progress": PROGRESS.count,
            "seconds_since_progress": round(time.monotonic() - self._since, 1),
        }  # fmt: skip
        beside = self._folder / f".{HEARTBEAT}"
        try:
            beside.write_text(json.dumps(beat) + "\n", encoding="utf-8")
            os.replace(beside, self._folder / HEARTBEAT)
        except OSError as error:  # a disk that is full for a while
            if not self._said:
                logger.warning("no heartbeat could be written (%s)", of_system(error))
            self._said = True

    def _end_the_run(self) -> None:
        """From here, for the main thread does not come back; once the other ranks have looked, too."""
        path = self._folder / f"hang-rank-{self._rank}.txt"
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        places = [f"rank {rank} in {place.partition(' ')[2]}" for rank, place in sorted(self._seen.items())]
        if len(places) > NAMED:
            places = [*places[:NAMED], f"and {len(places) - NAMED} more"]
        print(
            f"error: no rank has done anything for {self._seconds:g} s (trainer.health.hang_seconds): {', '.join(places)}; "
            f"stacks in {path}",
            file=sys.stderr,
            flush=True,
        )
        if not self._end.wait(self._pause + GRACE):  # unless it has come back after all
            os._exit(1)
