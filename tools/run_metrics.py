"""What the tools that read a run share: the lines of its metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_ext.errors import UserError

__all__ = ["METRICS_FILE", "read_metrics"]

METRICS_FILE = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Lines of a run's log, in order; null is NaN, which JSON has not. A last line without its end, which the run is writing or
    was killed at, is left out.

    Args:
        run: its folder, or the file.

    Raises:
        UserError: no log, or not one of a run's.
    """
    log = run if run.is_file() else run / METRICS_FILE
    if not log.is_file():
        raise UserError(f"{run} has no {METRICS_FILE}: name the folder of a run (exp_manager.explicit_log_dir)")
    lines, rows = log.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            if number == len(lines):
                break
            row = ()
        if row is not None and not _is_row(row):
            raise UserError(f"{log}:{number} is no line of a run's log: a step and numbers by name are expected")
        if row is not None:
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(x) in (int, float, type(None)) for x in row.values())
    )
