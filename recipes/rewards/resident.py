"""How much memory the processes of a sandbox hold, asked twenty times a second while it runs.

A sandbox has a /proc of its own, in which its processes alone stand: reading that costs what they are, and not what runs on the
machine besides. Where it cannot be read their ancestry is looked for in the whole of the machine's. What processes share, as
those that are forked do, is counted once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

__all__ = ["resident_in"]

logger = logging.getLogger(__name__)

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_in(first: int, outer: int, limit: int) -> int:
    """Bytes that are resident; below the limit they may be fewer.

    Args:
        first: the first process in the sandbox, by its number outside of it, where /proc is the sandbox's own already.
        outer: whoever has started it, in case.
    """
    folder = Path("/proc", str(first), "root", "proc")
    try:
        processes = [folder / name for name in os.listdir(folder) if name.isdigit()]
    except FileNotFoundError:  # it has ended
        return 0
    except PermissionError as error:
        _say_once(str(error))
        processes = _descendants(outer)
    seen = sum(map(_resident, processes))
    return seen if seen <= limit else sum(map(_share, processes))


def _resident(process: Path) -> int:
    """Quick to ask; what is shared is counted in each."""
    try:
        return int((process / "statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
        return 0


def _share(process: Path) -> int:
    """Of what is shared an equal part."""
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:
        return _resident(process)
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def _descendants(pid: int) -> Sequence[Path]:
    try:
        parent = psutil.Process(pid)
        return [Path("/proc", str(each.pid)) for each in (parent, *parent.children(recursive=True))]
    except psutil.Error:  # ended meanwhile
        return []


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("processes of sandboxes are looked for among all of this machine, which takes longer: %s", reason)
