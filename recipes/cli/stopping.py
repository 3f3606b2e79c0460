"""Why a run saves and stops before its last step: its time is up, or somebody asks.

Asking is done by the file that MEGATRON_EXT_STOP_FILE names, which job scripts put on the shared filesystem, or by SIGUSR1 to the
recipe or any of its ranks.
"""

from __future__ import annotations

import math
import os
import signal
import time

from megatron_ext.errors import UserError

__all__ = ["REASONS", "STOP_FILE_VARIABLE", "StopRequests", "listen", "seconds_of"]

STOP_FILE_VARIABLE = "MEGATRON_EXT_STOP_FILE"
REASONS = ("", "max_time_per_run reached", "asked to stop")
_asked = False


def listen() -> None:
    """Take SIGUSR1 as a request. Call it early: until then the signal ends the process."""
    signal.signal(signal.SIGUSR1, _ask)


def _ask(*_) -> None:
    global _asked
    _asked = True


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
