"""Processes that a rank keeps beside itself: what they make of signals, when they end, and how that is said."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
from multiprocessing.connection import wait

__all__ = ["die_with_parent", "ending", "group_dies_with", "leave_signals"]

PR_SET_PDEATHSIG = 1  # prctl(2)
F_SETSIG = 10  # fcntl(2)


def leave_signals() -> None:
    """Of those that go to all processes of a job: this one ends with its run."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Whatever this process is at then. Its parent is the thread that has started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def group_dies_with(sentinel: int) -> None:
    """The kernel kills this process's group when the other end of a pipe is closed; a thread of it would wait for a loop in C."""
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(sentinel, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if wait([sentinel], 0):  # it was closed before
        os.killpg(0, signal.SIGKILL)


def ending(code: int) -> str:
    """How a process ended.

    Args:
        code: its exit code; a signal's number, negative, where one has ended it.
    """
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"{signal.Signals(-code).name}{', is memory short?' if code == -signal.SIGKILL else ''}"
    return f"signal {-code}"
