"""What this rank is at, and that it goes on, for whoever watches it.

Whatever may take long tells as it goes; telling costs a few hundred nanoseconds. There is one rank in a process, so there is one
`PROGRESS`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["PROGRESS", "RankProgress"]


class RankProgress:
    """
    Attributes:
        count: grows whenever something is done.
        step: of training, the one that is being taken.
        is_bounded: whether this rank waits for something that has a limit of its own, such as a server.
    """

    def __init__(self):
        self.count = self.step = 0
        self._phases: list[str] = []
        self._bounded = 0

    @property
    def phase(self) -> str:
        """The innermost one."""
        return self._phases[-1] if self._phases else "the loop"

    @property
    def is_bounded(self) -> bool:
        return self._bounded > 0

    def made(self) -> None:
        """Something is done: a stream, a token of every response, an answer."""
        self.count += 1

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        self._phases.append(phase)
        self.made()
        try:
            yield
        finally:
            self._phases.pop()
            self.made()

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        """Waiting in here ends by itself."""
        self._bounded += 1
        try:
            yield
        finally:
            self._bounded -= 1
            self.made()


PROGRESS = RankProgress()
