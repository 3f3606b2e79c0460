"""One run in a folder at a time: who holds it, and whether that run still lives.

`<run>/.lock/<number>` names the holder. Who wants the folder looks at all files there, makes the one with the next number, which
only one process can, over NFS, too, and holds the folder if no other has appeared meanwhile. A folder within the run's, because
NeMo's exp_manager moves files of the run's folder and leaves folders.

The holder touches its file every `BEAT` seconds. Its age is the difference to a file that is made at that moment in the same
place: the file server's clock is read twice, and no machine's. What holds a lock and does not live is found

- at once, if its process is gone and that can be seen: from the same machine, where processes have the same numbers;
- at once, if its Slurm job has ended or has been queued again;
- after `DEAD` seconds without a touch everywhere else.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext.errors import UserError
from recipes.run.holder import Holder

__all__ = ["LOCK_FOLDER", "FolderLock", "refuse_if_held"]

LOCK_FOLDER = ".lock"
BEAT, DEAD = 15.0, 120.0
TRIES = 20


@dataclass(frozen=True)
class _Found:
    """A file of a lock folder: where, what it says, whose it is (None: it does not say), seconds since it was touched."""

    path: Path
    text: str
    holder: Holder | None
    age: float

    def lives(self, here: Holder) -> bool:
        return self.age < DEAD and (self.holder is None or not self.holder.has_ended(here))


class FolderLock:
    """A folder that this process holds. See `take`.

    Attributes:
        taken_away: whether it has been seen that another process took it, see `check`.
    """

    def __init__(self, path: Path, holder: Holder, made: list[Path]):
        self._path, self._holder, self._made = path, holder, made
        self.taken_away = False
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lock of the run folder", daemon=True)
        self._heart.start()

    @classmethod
    def take(cls, folder: Path) -> FolderLock:
        """Make the folder if it is not there, and hold it until `release`.

        Raises:
            UserError: another process holds it.
        """
        here = Holder.this_process()
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            path = _take(folder, here)
        except BaseException:
            _remove_empty([folder / LOCK_FOLDER, *made])
            raise
        return cls(path, here, made)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def check(self) -> None:
        """
        Raises:
            UserError: another process has found this one without a sign of life and has taken the folder.
        """
        if self.taken_away or not self._is_ours():
            raise UserError(
                f"{self._path.parent.parent} is no longer this run's: {self._holder.name} gave no sign of life for "
                f"{DEAD:.0f} s, as when it is suspended or the file server away, and another run has taken the folder; nothing "
                "more is written to it"
            )

    def release(self) -> None:
        """Let others have the folder. Folders that were made for the lock and are empty go. Safe to call twice."""
        self._released.set()
        self._heart.join()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self._path.unlink()
        _remove_empty([self._path.parent, *self._made])

    def _is_ours(self) -> bool:
        try:
            return self._holder.token in self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                if not self._is_ours():
                    self.taken_away = True
                    return
                os.utime(self._path)


def refuse_if_held(folder: Path) -> None:
    """A look, which may be out of date a moment later.

    Raises:
        UserError: another process holds the folder.
    """
    here = Holder.this_process()
    try:
        seen = _look(folder / LOCK_FOLDER)
    except OSError:  # another user's, who lets no one look
        return
    for found in seen:
        if found.lives(here) and (found.holder is None or not found.holder.is_same_process(here)):
            raise UserError(_refusal(folder, found))


def _take(folder: Path, here: Holder) -> Path:
    """The path of the lock, once it is held."""
    place, text = folder / LOCK_FOLDER, json.dumps(asdict(here), indent=1) + "\n"
    for _ in range(TRIES):
        try:
            place.mkdir(parents=True, exist_ok=True)
            seen = _look(place)
            for found in seen:
                if found.lives(here):
                    raise UserError(_refusal(folder, found))
            path = place / str(1 + max((int(found.path.name) for found in seen), default=0))
            _write_new(path, text)
            dead = {(found.path, found.text) for found in seen}
            # One that appeared between the look and the file: whoever sees the other steps back, and both may.
            if {(found.path, found.text) for found in _look(place)} - {(path, text)} <= dead:
                for found in seen:
                    found.path.unlink(missing_ok=True)
                return path
            path.unlink()
        except (FileExistsError, FileNotFoundError):  # another was faster; a folder went with the lock before
            pass
        time.sleep(random.uniform(0.01, 0.2))
    raise UserError(f"other runs take exp_manager.explicit_log_dir={folder} at this moment; start one of them")


def _look(place: Path) -> list[_Found]:
    paths = [path for path in place.glob("*") if path.name.isdecimal()]
    if not paths:
        return []
    with tempfile.TemporaryFile(dir=place) as fresh:
        now = os.fstat(fresh.fileno()).st_mtime
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
            found.append(_Found(path, text, _holder(text), now - os.fstat(file.fileno()).st_mtime))
    return found


def _holder(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):  # killed before it had written it; of another version of ours
        return None


def _write_new(path: Path, text: str) -> None:
    """
    Raises:
        FileExistsError: it is there.
    """
    with open(path, "x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:  # no room
            path.unlink()
            raise


def _refusal(folder: Path, found: _Found) -> str:
    who = f"{found.holder.name} since {found.holder.since}" if found.holder else "a process that does not say its name"
    return (
        f"exp_manager.explicit_log_dir={folder} is held by another run: {who}, last sign of life {max(found.age, 0):.0f} s ago; "
        f"wait until it has ended, end it, or choose a new folder (if it is surely gone, remove {found.path})"
    )


def _remove_empty(folders: list[Path]) -> None:
    """From the innermost outwards, as far as they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
