"""Loggers in a process of their own: real NeMo, real TensorBoard files."""

from __future__ import annotations

import json
import os
import random
import signal

import pytest

from megatron_ext.errors import UserError
from recipes.run.log_process import LoggedTable, LogProcess
from recipes.run.run_log import mlflow_arguments
from recipes.run.settings import ExpManagerSection
from tests.waiting import until

pytestmark = pytest.mark.kills

KEYS = {
    "create_checkpoint_callback": False,
    "seconds_to_sleep": 0,
    "create_wandb_logger": False,
    "wandb_logger_kwargs": {},
}


COLUMNS = ["reward", "tokens", "response"]


def table() -> list[list]:
    """Of texts that a page could take for something else."""
    return [[random.random(), random.randrange(99), f"<b>|{random.random()}`*_[x](http://y)\n\x1b"] for _ in range(3)]


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
    until(lambda: not killed._process.is_alive())
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
    rows = table()
    log.log_table("train_rollouts/samples", COLUMNS, rows, 4)
    log.finalize("success")
    (file,) = tmp_path.rglob("*.wandb")
    assert file.stat().st_size > 1000  # without the end of the run only its first bytes are there
    (file,) = tmp_path.rglob("media/table/train_rollouts/samples_*.table.json")
    found = json.loads(file.read_text())
    assert found["columns"] == COLUMNS and found["data"] == rows


@pytest.mark.parametrize("where", ["the run's folder", "a place of its own"])
def test_mlflow_has_numbers_and_tables_where_they_belong(where, tmp_path, monkeypatch):
    """Nothing is left in the folder that the run was started in."""
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install mlflow")
    (tmp_path / "started in").mkdir()
    monkeypatch.chdir(tmp_path / "started in")
    folder, store = tmp_path / "run", f"sqlite:///{tmp_path / 'run/mlflow.db'}"
    given = {"experiment_name": "tests"}
    if where == "a place of its own":
        store = f"sqlite:///{tmp_path / 'own.db'}"
        given |= {"tracking_uri": store, "artifact_location": (tmp_path / "own").as_uri()}
    log = LogProcess.start()
    section = ExpManagerSection(str(folder), create_mlflow_logger=True, mlflow_logger_kwargs=given)
    log.open(keys(folder), mlflow_arguments(section, folder))
    values, rows = [random.uniform(-5, 5) for _ in range(5)], table()
    for step, value in enumerate(values):
        log.log_metrics({"train_optim/loss": value}, step)
    log.log_table("train_rollouts/samples", COLUMNS, rows, 4)
    log.finalize("success")
    client = mlflow.MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tests"]
    (run,) = client.search_runs([experiment.experiment_id])
    found = client.get_metric_history(run.info.run_id, "train_optim/loss")
    assert [(m.step, m.value) for m in found] == list(enumerate(values)) and run.info.status == "FINISHED"
    (file,) = tmp_path.rglob("train_rollouts/samples/step-000004.md")
    assert file.read_text() == LoggedTable("train_rollouts/samples", COLUMNS, rows).markdown()
    assert file.is_relative_to(tmp_path / ("own" if where == "a place of its own" else "run/mlflow"))
    assert not os.listdir(tmp_path / "started in")


def test_other_ranks_have_none(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = LogProcess.start()
    log.log_metrics({"x": 1.0}, 1)
    log.finalize("success")
    assert log._process is None
