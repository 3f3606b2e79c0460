"""Until something happens elsewhere: in another process, in a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["until"]

T = TypeVar("T")


def until(
    happens: Callable[[], T],
    said: Callable[[], object] = lambda: "",
    over: Callable[[], object] = lambda: False,
    seconds: float = 600,
    pause: float = 0.02,
) -> T:
    """What `happens` gives once it is true.

    Args:
        said: what explains that it never is.
        over: whether it cannot become true any more.
        seconds: after which nobody waits any more: far more than it takes.
        pause: seconds between looks.

    Raises:
        AssertionError: it will not be, or has not been in that time.
    """
    deadline = time.monotonic() + seconds
    while not (found := happens()):
        late = time.monotonic() > deadline
        if late or over():
            # It may have happened between the two looks.
            assert (found := happens()), f"not in {seconds} s: {said()}" if late else f"it is over: {said()}"
            break
        time.sleep(pause)
    return found
