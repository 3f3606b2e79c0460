"""Where numbers go: one JSON line per step, TensorBoard, and the timers that feed both."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ext.files import json_text
from megatron_ext.runtime.progress import PROGRESS

__all__ = ["MetricsLog", "Timers"]


class Timers:
    """Wall-clock seconds by name, summed until read. On a GPU its work in hand is waited for, at both ends.

    Attributes:
        totals: of all readings, and of what is not read yet.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.totals: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str):
        with PROGRESS.within(name):
            _synchronize()
            start = time.perf_counter()
            try:
                yield
            finally:
                _synchronize()
                taken = time.perf_counter() - start
                self.seconds[name] += taken
                self.totals[name] += taken

    def read(self) -> dict[str, float]:
        """`{"timers/<name>": seconds}` since the last reading."""
        values = {f"timers/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds.clear()
        return values


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class MetricsLog:
    """Append-only log of named numbers. Only rank 0 holds one; `None` as folder makes it silent.

    Args:
        folder: gets `metrics.jsonl`, one object per step.
        loggers: objects with Lightning's `log_metrics(metrics, step)` and `log_table(name, columns, rows, step)`, e.g. those of
            `recipes.run.log_process`.
    """

    def __init__(self, folder: Path | None, loggers=()):
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8") if folder else None
        self.loggers = list(loggers)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self.file is None:
            return
        self.file.write(json_text({"step": step, **metrics}) + "\n")
        self.file.flush()
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)

    def write_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """To the loggers alone."""
        for logger in self.loggers:
            logger.log_table(name, columns, rows, step=step)

    def close(self, status: str = "success") -> None:
        """
        Args:
            status: "success" or "failed", for loggers that tell.
        """
        if self.file is not None:
            self.file.close()
            for logger in self.loggers:
                logger.finalize(status)
