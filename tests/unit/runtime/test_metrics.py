"""Timers and the metrics file."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_ext.runtime.metrics import MetricsLog, Timers
from tools.run_metrics import read_metrics


class Logger:
    """What MetricsLog needs of a logger, kept in memory."""

    def __init__(self):
        self.seen: list = []

    def log_metrics(self, metrics, step):
        self.seen.append((step, metrics))

    def finalize(self, status):
        self.seen.append(status)


def test_one_json_line_per_step_and_every_logger(tmp_path: Path):
    logger = Logger()
    log = MetricsLog(tmp_path, [logger])
    log.write(1, {"a/b": 0.5})
    log.write(2, {"a/b": 0.25, "c/d": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # on disk before the log is closed
    assert [json.loads(line) for line in lines] == [{"step": 1, "a/b": 0.5}, {"step": 2, "a/b": 0.25, "c/d": 3}]
    log.close()
    assert logger.seen == [(1, {"a/b": 0.5}), (2, {"a/b": 0.25, "c/d": 3}), "success"]


def test_numbers_that_are_none_are_null_in_the_file_and_nan_to_who_reads_it(tmp_path: Path):
    logger = Logger()
    log = MetricsLog(tmp_path, [logger])
    log.write(3, {"a/b": math.nan, "c/d": -math.inf, "e/f": 0.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "a/b": None, "c/d": None, "e/f": 0.5}
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a/b"]) and math.isnan(row["c/d"]) and (row["step"], row["e/f"]) == (3, 0.5)
    ((_, seen),) = logger.seen
    assert math.isnan(seen["a/b"]) and seen["c/d"] == -math.inf
    log.close()


def test_a_log_without_folder_is_silent(tmp_path: Path):
    logger = Logger()
    log = MetricsLog(None, [logger])
    log.write(1, {"a/b": 1})
    log.close()
    assert not logger.seen and not list(tmp_path.iterdir())


def test_timers_sum_until_read_and_count_a_failing_block():
    timers = Timers()
    for _ in range(2):
        with timers("work"):
            pass
    first = timers.seconds["work"]
    try:
        with timers("work"):
            raise KeyError
    except KeyError:
        pass
    assert timers.seconds["work"] > first > 0
    assert list(timers.read()) == ["timers/work"]
    assert timers.read() == {}
