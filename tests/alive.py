"""Whether a process is there."""

from __future__ import annotations

import time

import psutil

__all__ = ["alive", "gone"]


def alive(pid: int) -> bool:
    """One that has ended and waits for its parent to look is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(*pids: int, within: float = 60.0) -> bool:
    """Whether none of them is there, a moment later: a signal may take one."""
    deadline = time.monotonic() + within
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
