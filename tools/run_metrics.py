"""What the tools that read a run share: the lines of its metrics.jsonl, and where the seconds of a step went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.errors import UserError

__all__ = ["METRICS_FILE", "REST", "WHOLE", "read_metrics", "seconds_of"]

METRICS_FILE = "metrics.jsonl"
WHOLE = "timers/step"
REST = "the rest"
# In `timers/step` or in another of its timers are all but these.
APART = (WHOLE, "timers/validation")
# A timer whose seconds are in those of another one, too.
WITHIN = {"timers/weights": "timers/generate"}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Lines of a run's log, in order. A last line without its end, which the run is writing or was killed at, is left out.

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
            rows.append(row)
    return rows


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and type(row.get("step")) is int and all(type(x) in (int, float) for x in row.values())


def seconds_of(row: Mapping[str, float]) -> dict[str, float]:
    """Of one step by timer, none counted twice, and in a run of GRPO what no timer names."""
    found = {name: seconds for name, seconds in row.items() if name.startswith("timers/") and name not in APART}
    for inner, outer in WITHIN.items():
        if inner in found:
            found[outer] = found.get(outer, 0.0) - found[inner]
    return found | {REST: row[WHOLE] - sum(found.values())} if WHOLE in row else found
