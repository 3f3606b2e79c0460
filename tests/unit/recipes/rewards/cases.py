"""What tests of rewards share: prompts by their rows, and the command that serves a reward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

from recipes.data.rows import Prompt
from tests.recipe_runs import Running

__all__ = ["prompts", "served"]


def prompts(*rows: dict) -> list[Prompt]:
    """On lines 3, 5, 7, ..."""
    return [Prompt((1,), row, 3 + 2 * i) for i, row in enumerate(rows)]


@contextlib.contextmanager
def served(*arguments: object, port: int = 0, url_file: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The command, once it listens."""
    with Running("launch/serve_reward.py", "--port", port, "--url-file", url_file, *arguments) as running:
        running.until(url_file.exists)
        server, children = psutil.Process(running.pid), []
        yield server, url_file.read_text()
        with contextlib.suppress(psutil.NoSuchProcess):  # it was killed
            children = server.children(recursive=True)
    psutil.wait_procs(children, timeout=120)
