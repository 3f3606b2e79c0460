"""A control group (cgroup v2) for a program, where this user may make one: the kernel bounds what its processes hold together.

They are made beside this process's own group or above it, where memory and pids are handed down already and somebody has let this
user write: root on a machine with systemd, or `systemd-run --user --scope -p Delegate=yes`. Nothing of others is changed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ControlGroup", "groups_home", "own_group", "sweep"]

logger = logging.getLogger(__name__)

NAME = "megatron-ext-sandbox"
NEEDED = {"memory", "pids"}
EMPTIES_SECONDS = 5.0  # in which processes that were killed have left
_numbers = itertools.count()


class ControlGroup:
    """
    Args:
        folder: of the group.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    @contextlib.contextmanager
    def made(cls, home: Path, memory: int, processes: int) -> Iterator[ControlGroup]:
        """One that is removed again, with what is in it.

        Args:
            memory: bytes, of processes, of files in memory, and of the kernel for them.
            processes: and threads.

        Raises:
            OSError: it cannot be made.
        """
        group = cls(home / f"{NAME}-{os.getpid()}-{next(_numbers)}")
        group.folder.mkdir()
        try:
            limits = {"memory.max": memory, "memory.swap.max": 0, "memory.oom.group": 1, "pids.max": processes}
            for name, value in limits.items():
                file = group.folder / name
                if file.exists() or name != "memory.swap.max":  # of a kernel that counts no swap
                    file.write_text(str(value))
            yield group
        finally:
            group._remove()

    def entering(self, command: list[str]) -> list[str]:
        """A command that begins in this group and becomes that one."""
        return ["/bin/sh", "-c", 'echo 0 > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    @property
    def was_full(self) -> bool:
        """Whether the kernel has killed it because its memory did not suffice."""
        events = dict(line.split() for line in (self.folder / "memory.events").read_text().splitlines())
        return int(events["oom_kill"]) > 0

    def _remove(self) -> None:
        with contextlib.suppress(OSError):  # before Linux 5.14 there is no such file
            (self.folder / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + EMPTIES_SECONDS
        while True:
            try:
                self.folder.rmdir()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    logger.warning("a sandbox's control group is left behind: %s", error)
                    return
                time.sleep(0.002)


@functools.cache
def groups_home() -> Path | None:
    """The group in which such are made; None: there is none. The log says which."""
    own = own_group(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    for folder in own:
        if _may_hold_groups(folder):
            sweep(folder)
            logger.info("memory and processes of sandboxes are bounded by control groups in %s", folder)
            return folder
    reason = (
        f"this user may make none with memory and pids at {own[0]} or above it" if own else "there is no cgroup v2 here"
    )
    logger.info("memory of sandboxes is added up over their processes, with no control groups: %s", reason)
    return None


def own_group(mounts: str, groups: str) -> list[Path]:
    """Where this process's group of cgroup v2 is, and those above it that are seen; empty: nowhere.

    Args:
        mounts: as /proc/self/mountinfo.
        groups: as /proc/self/cgroup.
    """
    path = next((Path(line[3:]) for line in groups.splitlines() if line.startswith("0::")), None)
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        if path is None or after.split(" ")[0] != "cgroup2":
            continue
        root, place = (Path(field.encode().decode("unicode_escape")) for field in before.split(" ")[3:5])
        if path.is_relative_to(root):
            inside = path.relative_to(root)
            return [place / inside, *(place / each for each in inside.parents if each != inside)]
    return []


def _may_hold_groups(folder: Path) -> bool:
    try:
        if not set((folder / "cgroup.subtree_control").read_text().split()) >= NEEDED:
            return False
        with ControlGroup.made(folder, 1 << 26, 8) as group:
            return (
                subprocess.run(group.entering(["/bin/true"]), capture_output=True, env={}, check=False).returncode == 0
            )
    except OSError:
        return False


def sweep(folder: Path) -> None:
    """Remove groups of processes that were killed before they could."""
    for each in folder.glob(f"{NAME}-*"):
        if not Path("/proc", each.name.split("-")[-2]).exists():
            with contextlib.suppress(OSError):
                each.rmdir()
