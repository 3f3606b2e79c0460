"""What the programs share that import once and fork a child for each line they are given. See `tests.children`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

__all__ = ["fork_for_each_line", "say"]


def say(*words: object) -> None:
    """A line in one write: print under PYTHONUNBUFFERED is one per word, and others may come between, or a kill."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def fork_for_each_line(child: Callable[..., None]) -> None:
    """Run `child(*words)` for each line of stdin, in a process group of its own, one after the other."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                child(*line.split())
            finally:
                os._exit(1)
        say("pid", pid)
        os.waitpid(pid, 0)
        say("gone")
