"""Whether somebody waits for what a reward computes: who has asked a server may be gone before it answers.

A reward that takes long asks between its parts, and gives up where nobody waits. In a run somebody always does.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar

from megatron_ext.errors import UserError

__all__ = ["Asker", "NobodyWaitsError", "asker", "serving"]


class NobodyWaitsError(UserError):
    """Who has asked is gone."""


class Asker:
    """Whoever waits for an answer, until it has `left`."""

    def __init__(self):
        self._gone = threading.Event()

    def left(self) -> None:
        self._gone.set()

    def check(self) -> None:
        """
        Raises:
            NobodyWaitsError: it has left.
        """
        if self._gone.is_set():
            raise NobodyWaitsError("whoever has asked for this reward is gone")


_asker: ContextVar[Asker] = ContextVar("asker", default=Asker())  # noqa: B039  one that never leaves


def asker() -> Asker:
    """Whom this thread computes for; for other threads of one's own, ask in this one."""
    return _asker.get()


def serving(who: Asker) -> None:
    """From here this context, and the threads that asyncio makes in it, compute for that one."""
    _asker.set(who)
