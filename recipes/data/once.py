"""What is made once on a machine, by whichever of its processes comes first, and read by all: others wait, and are told when it
fails.

Whoever makes it holds a lock of the machine, which the system takes from a process that dies; the next one then makes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import xxhash

from megatron_ext.errors import UserError, of_system
from megatron_ext.files import give_name

__all__ = ["made_once"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
POLL_SECONDS = 0.1
TOLD_SECONDS = 15.0  # between lines that say what is waited for
UNFINISHED, WORKER = ".unfinished-", "worker.lock"


def made_once(
    place: Path, load: Callable[[Path], T | None], make: Callable[[Path, Callable[[str], None]], None], what: str
) -> T:
    """What stands in a folder, which is made if it is not there, or not what it should be.

    Args:
        place: of the folder. It is there whole or not at all.
        load: (the folder) -> what stands in it; None: it must be made anew. Must be as good a judge of what another process
            has made as of its own.
        make: (a folder that is there and empty, tell) fills it; `tell` is called with a few words on how far it is, which are
            shown where others wait.
        what: it is, for messages.

    Raises:
        UserError: making it has failed, here or in the process that has been waited for.
    """
    if (found := load(place)) is not None:
        return found
    with _held(place, what) as lock:
        if (found := load(place)) is not None:  # made meanwhile
            return found
        made = _missing(place.parent)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _clear(place)
            with _workshop(place) as beside:
                make(beside, lock.tell)
                _put(beside, place)
        except BaseException as error:
            for folder in made:  # nothing is left where nothing was
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if isinstance(error, OSError):
                error = UserError(f"{what} cannot be kept in {place.parent}: {of_system(error)}")
            if isinstance(error, Exception):
                lock.fail(error)
            raise error
        found = load(place)
    if found is None:
        raise UserError(f"{what}, which have just been written to {place}, cannot be read again: is the disk sound?")
    return found


def _missing(folder: Path) -> list[Path]:
    """The folder and those above that are not there, the innermost first."""
    return [path for path in (folder, *folder.absolute().parents) if not path.exists()]


def _clear(place: Path) -> None:
    """Remove what is damaged, and what killed processes of this machine have left."""
    shutil.rmtree(place, ignore_errors=True)
    for path in place.parent.glob(f"{glob.escape(place.name)}{UNFINISHED}{os.uname().nodename}-*"):
        if _is_left(path):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _workshop(place: Path) -> Iterator[Path]:
    """An empty folder beside, within one that says by a lock that somebody is at it: who has another temporary folder, or another
    name for this one, does not share `_held`'s."""
    outer = Path(tempfile.mkdtemp(prefix=f"{place.name}{UNFINISHED}{os.uname().nodename}-", dir=place.parent))
    try:
        with open(outer / WORKER, "w") as file:
            with contextlib.suppress(OSError):  # a filesystem without locks: what is left stays there
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            inner = outer / "it"
            inner.mkdir()
            yield inner
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _is_left(path: Path) -> bool:
    """Whether nobody is at it any more, as far as can be told."""
    try:
        with open(path / WORKER, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _put(beside: Path, place: Path) -> None:
    """Give the folder its name, unless another machine has put one there meanwhile, as good as ours."""
    try:
        give_name(beside, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


class _Lock:
    """Of this machine, held by this process. Its file says how far the holder is, or how it has failed."""

    def __init__(self, file: int):
        self._file = file

    def tell(self, words: str) -> None:
        self._write({"told": words})

    def fail(self, error: Exception) -> None:
        self._write({"failed": str(error), "user": isinstance(error, UserError), "at": time.time_ns()})

    def _write(self, said: dict) -> None:
        text = json.dumps(said).encode()
        with contextlib.suppress(OSError):  # a temporary folder that is full: the others find out for themselves
            os.pwrite(self._file, text + b" " * (os.fstat(self._file).st_size - len(text)), 0)

    def read(self) -> dict:
        try:
            return json.loads(os.pread(self._file, os.fstat(self._file).st_size, 0))
        except ValueError:  # nothing yet, or it is being written
            return {}


@contextlib.contextmanager
def _held(place: Path, what: str) -> Iterator[_Lock]:
    """
    Raises:
        UserError: it has been waited for, and whoever made it has failed.
    """
    name = f"megatron_ext-{os.getuid()}-{xxhash.xxh3_64_hexdigest(str(place.resolve()).encode())}.lock"
    path = Path(tempfile.gettempdir(), name)
    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(
            f"{path}, by which the processes of this machine agree who makes {what}, cannot be opened: {error.strerror}; let "
            "TMPDIR name a folder of yours"
        ) from error
    try:
        lock, since = _Lock(file), time.time_ns()
        _wait(file, lock, what)
        said = lock.read()
        if said.get("at", 0) >= since:
            raise (UserError if said["user"] else RuntimeError)(said["failed"])
        lock.tell("")
        yield lock
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # a process that we have forked has the file, too
        os.close(file)


def _wait(file: int, lock: _Lock, what: str) -> None:
    """Until the lock is ours."""
    told = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(POLL_SECONDS)
        if time.monotonic() - told > TOLD_SECONDS:
            told, words = time.monotonic(), lock.read().get("told", "")
            logger.info("waiting for %s, which another process of this machine makes%s", what, words and f": {words}")
