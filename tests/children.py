"""Children of a program that imports once and forks one for each line it is given (`tests.programs.forking`)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

from tests.harness import ROOT

__all__ = ["Children"]


class Children:
    """
    Args:
        program: a module of tests.programs.
    """

    def __init__(self, program: str):
        self.parent = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"tests.programs.{program}"],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *exception) -> None:
        self.parent.kill()
        self.parent.communicate()

    def start(self, *words: object) -> int:
        """The id of a new child, which is given these words. There is one at a time: the last must be "gone"."""
        self.parent.stdin.write(" ".join(map(str, words)) + "\n")
        self.parent.stdin.flush()
        # The child may speak before its parent has told its id.
        self._early: list[list[str]] = []
        while (said := self._read())[0] != "pid":
            self._early.append(said)
        return int(said[1])

    def said(self) -> list[str]:
        """The words of the next line of the child, or ["gone"] when it has ended."""
        return self._early.pop(0) if self._early else self._read()

    def kill(self, child: int) -> None:
        """The child and all that it has started, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)

    def _read(self) -> list[str]:
        line = self.parent.stdout.readline()
        assert line, self.parent.stderr.read()[-3000:]
        return line.split()
