"""What a run has started ends with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_ext.vllm_servers.process import INSIDE
from tests.harness import ROOT
from tests.waiting import until

GUARD = str(INSIDE / "guard.py")
# A command with a child of its own, as a server has: both write their ids.
COMMAND = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
guard = [sys.executable, "-I", sys.argv[1], str(os.getpid()), sys.argv[2], sys.executable, "-c", sys.argv[3]]
process = subprocess.Popen(guard, start_new_session=True)
print(process.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def started(tmp_path: Path):
    """(a run, its guard, the ids of the command and its child, the folder of the run)."""
    folder = tmp_path / "weights"
    (folder / "v000001").mkdir(parents=True)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, GUARD, str(folder), COMMAND], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    # The run's own line may come behind that of the command.
    (guard,), pids = sorted((list(map(int, parent.stdout.readline().split())) for _ in range(2)), key=len)
    yield parent, guard, pids, folder
    for pid in (parent.pid, guard, *pids):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    parent.wait()


def test_a_killed_run_leaves_no_server_and_no_weights(started):
    parent, guard, pids, folder = started
    assert all(map(alive, pids))
    parent.kill()
    until(lambda: not any(map(alive, [guard, *pids])), lambda: "the server outlived the run")
    assert not folder.exists()


def test_a_server_that_dies_takes_its_own_processes_along(started):
    _, guard, pids, folder = started
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: not any(map(alive, [guard, *pids])), lambda: "the server's processes outlived it")
    assert folder.exists(), "the run goes on, and starts it again"


def test_a_guard_is_told_to_end_what_it_guards(started):
    _, guard, pids, folder = started
    os.kill(guard, signal.SIGTERM)
    until(lambda: not any(map(alive, [guard, *pids])), lambda: "the server outlived its guard")
    assert folder.exists()


def test_the_server_of_a_killed_guard_ends(started):
    _, guard, pids, _ = started
    os.kill(guard, signal.SIGKILL)
    until(lambda: not alive(pids[0]), lambda: "the server outlived its guard")
