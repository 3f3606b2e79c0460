"""What tests of rewards share: prompts by their rows, and the command that serves a reward."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from recipes.data.rows import Prompt
from tests.harness import ROOT

__all__ = ["free_port", "prompts", "served"]


def prompts(*rows: dict) -> list[Prompt]:
    """On lines 3, 5, 7, ..."""
    return [Prompt((1,), row, 3 + 2 * i) for i, row in enumerate(rows)]


@contextlib.contextmanager
def served(*arguments: object, port: int = 0, url_file: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command, until it listens."""
    command = [sys.executable, "launch/serve_reward.py", "--port", port, "--url-file", url_file, *arguments]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT)
    try:
        while not url_file.exists():
            assert process.poll() is None
            time.sleep(0.05)
        yield process, url_file.read_text()
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        psutil.wait_procs(children, timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
