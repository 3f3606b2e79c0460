"""Control groups of sandboxes: found where somebody lets this user make them, and left nowhere behind."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from pathlib import Path

import pytest

from recipes.rewards import cgroup
from recipes.rewards.cgroup import NAME, ControlGroup, groups_home, own_group, sweep

V1 = "33 28 0:29 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n"
needs_groups = pytest.mark.skipif(groups_home() is None, reason="no control groups can be made here")


def mount(root: str, place: str) -> str:
    return f"{V1}42 32 0:27 {root} {place} rw,nosuid,nodev shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.mark.parametrize(
    ("mounts", "groups", "wanted"),
    [
        (mount("/", "/sys/fs/cgroup"), "0::/a/b.scope\n", ["/sys/fs/cgroup/a/b.scope", "/sys/fs/cgroup/a", "/sys/fs/cgroup"]),
        (mount("/", "/sys/fs/cgroup"), "0::/\n", ["/sys/fs/cgroup"]),
        (mount("/", "/sys/fs/cgroup/unified"), "8:pids:/x\n0::/\n", ["/sys/fs/cgroup/unified"]),
        (mount("/job", "/sys/fs/cgroup"), "0::/job/step\n", ["/sys/fs/cgroup/step", "/sys/fs/cgroup"]),
        (mount("/", r"/with\040space"), "0::/a\n", ["/with space/a", "/with space"]),
        (mount("/other", "/sys/fs/cgroup"), "0::/job/step\n", []),
        (V1, "8:pids:/\n", []),
        (V1, "0::/\n", []),
    ],
)  # fmt: skip
def test_where_a_process_stands(mounts, groups, wanted):
    assert own_group(mounts, groups) == [Path(path) for path in wanted]


def test_the_log_says_once_which_it_is(caplog):
    groups_home.cache_clear()
    with caplog.at_level(logging.INFO, cgroup.__name__):
        found = {groups_home() for _ in range(3)}
    (record,) = caplog.records
    (home,) = found
    words = "memory of sandboxes is added up" if home is None else f"are bounded by control groups in {home}"
    assert words in record.getMessage()


def test_groups_that_nobody_owns_any_more_are_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine, left, other = (tmp_path / name for name in (f"{NAME}-{os.getpid()}-3", f"{NAME}-{ended.pid}-0", "user.slice"))
    for folder in (mine, left, other):
        folder.mkdir()
    sweep(tmp_path)
    assert mine.exists() and not left.exists() and other.exists()


@needs_groups
def test_a_group_bounds_what_enters_it_and_is_gone_afterwards():
    with ControlGroup.made(groups_home(), 50 << 20, 9) as group:
        assert {name: (group.folder / name).read_text().strip() for name in ("memory.max", "pids.max")} == {
            "memory.max": str(50 << 20), "pids.max": "9",
        }  # fmt: skip
        command = group.entering(["/bin/sh", "-c", "for i in 1 2 3; do sleep 100 & done; wait"])
        process = subprocess.Popen(command)
        procs = group.folder / "cgroup.procs"
        while len(procs.read_text().split()) < 4:
            time.sleep(0.01)
        assert str(process.pid) in procs.read_text().split() and not group.was_full
    assert process.wait() == -9 and not group.folder.exists()


@needs_groups
def test_one_whose_memory_is_full_is_killed_whole():
    with ControlGroup.made(groups_home(), 60 << 20, 9) as group:
        program = "import os, time\nos.fork()\nx = bytearray(b'1' * (100 << 20))\ntime.sleep(100)"
        done = subprocess.run(group.entering(["/usr/bin/env", "python3", "-c", program]), env=os.environ)
        assert done.returncode == -9 and group.was_full
        assert not (group.folder / "cgroup.procs").read_text().split()
