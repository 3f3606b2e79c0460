"""Loggers in a process of their own: real NeMo, real TensorBoard files."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from megatron_ext.errors import UserError
from recipes.run.log_process import LogProcess

pytestmark = pytest.mark.kills

KEYS = {
    "create_checkpoint_callback": False,
    "seconds_to_sleep": 0,
    "create_wandb_logger": False,
    "wandb_logger_kwargs": {},
}


def keys(folder) -> dict:
    return KEYS | {"explicit_log_dir": str(folder), "create_tensorboard_logger": True}


def test_numbers_arrive_and_a_logger_that_cannot_start_is_one_line(tmp_path, caplog):
    """One process for each of three ends; they import NeMo side by side."""
    good, bad, killed = LogProcess.start(), LogProcess.start(), LogProcess.start()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"exp_manager: the loggers cannot be started: \w+Error: "):
        bad.open(keys(tmp_path / "file"), None)
    bad.finalize("failed")

    good.open(keys(tmp_path / "run"), None)
    values = [random.uniform(-5, 5) for _ in range(7)]
    for step, value in enumerate(values):
        good.log_metrics({"train_optim/loss": value}, step)
    os.kill(good._process.pid, signal.SIGUSR1)  # a job that is asked to stop
    good.finalize("success")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    found = events.Scalars("train_optim/loss")
    assert [e.step for e in found] == list(range(7))
    assert [e.value for e in found] == pytest.approx(values, rel=1e-6)

    killed.open(keys(tmp_path / "other"), None)
    os.kill(killed._process.pid, signal.SIGKILL)
    while killed._process.is_alive():
        time.sleep(0.01)
    for step in range(3):
        killed.log_metrics({"x": 1.0}, step)
    (said,) = [record.getMessage() for record in caplog.records if "metrics.jsonl does" in record.getMessage()]
    assert "code -9" in said
    killed.finalize("success")


def test_weights_and_biases_has_all_numbers_when_the_run_is_over(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = LogProcess.start()
    offline = {"name": "drawn", "project": "tests", "save_dir": str(tmp_path)}
    log.open(keys(tmp_path / "run") | {"create_wandb_logger": True, "wandb_logger_kwargs": offline}, None)
    for step in range(5):
        log.log_metrics({"train_optim/loss": random.random()}, step)
    log.finalize("success")
    (file,) = tmp_path.rglob("*.wandb")
    assert file.stat().st_size > 1000  # without the end of the run only its first bytes are there


def test_other_ranks_have_none(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = LogProcess.start()
    log.log_metrics({"x": 1.0}, 1)
    log.finalize("success")
    assert log._process is None
