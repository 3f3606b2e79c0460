"""Why a run saves and stops before its last step: its time is up, or somebody asks.

Asking is done by the file that MEGATRON_EXT_STOP_FILE names, which job scripts put on the shared filesystem, by SIGUSR1 to the
recipe or any of its ranks, or by Ctrl-C (SIGINT) or SIGTERM to the recipe, of which a second one ends it at once. After these
two it exits as whoever is ended by them, with 130 or 143, so that nothing is started that was to follow a whole run.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable

from megatron_ext.errors import UserError

__all__ = ["ENDING", "REASONS", "STOP_FILE_VARIABLE", "StopRequests", "exit_code", "listen", "seconds_of"]

STOP_FILE_VARIABLE = "MEGATRON_EXT_STOP_FILE"
REASONS = ("", "max_time_per_run reached", "asked to stop")
ENDING = (signal.SIGINT, signal.SIGTERM)
_asked = False
_ended_by: int | None = None  # the first of these signals


def listen(*ending: int, tell: Callable[[], None] = lambda: None) -> None:
    """Take SIGUSR1 as a request, and the first of `ending`. Call it early: until then such a signal ends the process.

    Args:
        tell: called with every request, from a signal's handler.
    """

    def ask(number: int, _) -> None:
        global _asked, _ended_by
        if number in ending:
            if _ended_by is not None:
                raise SystemExit(128 + number)
            _ended_by = number
            name = signal.Signals(number).name
            words = f"\n{name}: the run ends after the step in hand, and saves; once more ends it at once\n"
            os.write(2, words.encode())
        _asked = True
        tell()

    for number in (signal.SIGUSR1, *ending):
        signal.signal(number, ask)


def exit_code() -> int:
    """Of a process that has ended well, unless a signal has asked it to."""
    return 0 if _ended_by is None else 128 + _ended_by


class StopRequests:
    """
    Args:
        max_time: "DD:HH:MM:SS" from now, or None.
        looks: whether this rank looks for the file; one does for all.

    Raises:
        UserError: a time of another form.
    """

    def __init__(self, max_time: str | None, looks: bool):
        self._deadline = time.monotonic() + seconds_of(max_time)
        self._file = os.environ.get(STOP_FILE_VARIABLE) if looks else None

    def now(self) -> int:
        """The number of the reason in `REASONS` that this rank knows of; 0: none."""
        if _asked or (self._file is not None and os.path.exists(self._file)):
            return 2
        return int(time.monotonic() > self._deadline)


def seconds_of(text: str | None) -> float:
    """Of "DD:HH:MM:SS"; infinite for None.

    Raises:
        UserError: a time of another form.
    """
    if text is None:
        return math.inf
    try:
        days, hours, minutes, seconds = (int(part) for part in text.split(":"))
    except ValueError:
        raise UserError(f'trainer.max_time_per_run must be quoted and look like "DD:HH:MM:SS", got {text!r}') from None
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
