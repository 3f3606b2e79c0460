"""A real Slurm of two nodes on this machine, and the jobs that are submitted to it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.waiting import until

__all__ = ["Cluster", "Job", "TWO_NODES", "started"]

WAIT = 600.0
NO_SLURM = 77
TWO_NODES = ["--nodes", "2", "--gpus-per-node", "0", "--processes", "1"]


@dataclass
class Cluster:
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        # Jobs run what runs the tests, whatever `make test PYTHON=...` has been told.
        ours = {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        return os.environ | ours

    def ask(self, *command: object) -> str:
        done = subprocess.run([*map(str, command)], env=self.env, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def idle(self) -> bool:
        return self.ask("sinfo", "-h", "-p", "test", "-o", "%D %t").split() == ["2", "idle"]

    def submit(self, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "launch/submit.py", *map(str, arguments)]
        return subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, check=False)

    def start(self, recipe: str, config: str, run_dir: Path, *overrides: object, nodes: list[str] = TWO_NODES) -> Job:
        options = ["--recipe", recipe, "--config", config, "--run-dir", run_dir, *nodes]
        done = self.submit(*options, "--", *overrides)
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.split()[-1], run_dir)


@dataclass
class Job:
    cluster: Cluster
    number: str
    run_dir: Path

    @property
    def state(self) -> str:
        return re.search(r"JobState=(\w+)", self.cluster.ask("scontrol", "show", "job", self.number))[1]

    @property
    def log(self) -> str:
        path = Path(f"{self.run_dir}.slurm", f"{self.number}.log")
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, what, seconds: float = WAIT) -> None:
        until(what, self._said, lambda: self.state in ("FAILED", "CANCELLED", "NODE_FAIL"), seconds, pause=0.2)

    def end(self) -> None:
        self.until(lambda: self.state == "COMPLETED")

    def fail(self) -> None:
        """Minutes, as `until`: collectives would wait for half an hour."""
        until(lambda: self.state in ("FAILED", "COMPLETED"), self._said, seconds=WAIT, pause=0.2)
        assert self.state == "FAILED", self._said()

    def _said(self) -> str:
        return f"{self.state}\n{self.log[-3000:]}"


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """Skips the test where Slurm cannot be had."""
    script = str(ROOT / "launch/test_cluster.sh")
    done = subprocess.run([script, "start", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode == NO_SLURM:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    yield Cluster(folder)
    subprocess.run([script, "stop", str(folder)], check=True)
