"""A run that was stopped and started again in its folder is the run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from recipes.cli.stopping import STOP_FILE_VARIABLE
from tests.recipe_runs import ROOT, SMALL, Running, metrics, run
from tests.saved_weights import saved_weights

pytestmark = pytest.mark.functional

RESUME = "exp_manager.resume_if_exists=true"
KEEP = ["exp_manager.checkpoint_callback_params.save_top_k=2", "trainer.devices=1"]
RECIPES = {
    "sft": ["trainer.sft.max_steps=10", "trainer.sft.save_interval=5"],
    "grpo": [
        "trainer.grpo.max_steps=10", "trainer.grpo.save_interval=5", "trainer.grpo.initial_policy_kl_penalty=0.1",
        "trainer.grpo.reference_policy_kl_type=k1", "trainer.grpo.use_kl_in_reward=true",
    ],
}  # fmt: skip


def start(task, recipe: str, out, *more: str):
    done = getattr(task, recipe)(out, *RECIPES[recipe], *KEEP, *more)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module", params=RECIPES)
def runs(request, task, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    start(task, request.param, folder / "straight", "exp_manager.checkpoint_callback_params.async_save=true")
    # As if it had been killed after step 7: in the midst of a line, and of a save.
    shutil.copytree(folder / "straight", folder / "stopped", symlinks=True)
    checkpoints = folder / "stopped/checkpoints"
    (checkpoints / "final").unlink()
    (checkpoints / "step-10").rename(checkpoints / "step-8.unfinished-0")
    (checkpoints / "step-8.unfinished-0/checkpoint.json").unlink()
    lines = (folder / "stopped/metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "stopped/metrics.jsonl").write_text("".join(lines[:7]) + '{"step": 8, "trai')
    shutil.copytree(folder / "stopped", folder / "moved", symlinks=True)
    done = start(task, request.param, folder / "stopped", RESUME)
    assert "going on after step 5" in done.out + done.err
    return request.param, folder


def test_bitwise_the_run_that_was_never_stopped(runs, world):
    _, folder = runs
    straight, stopped = (saved_weights(folder / name / "checkpoints/final", world) for name in ("straight", "stopped"))
    assert all(torch.equal(stopped[name], value) for name, value in straight.items())
    before, after = metrics(folder / "straight"), metrics(folder / "stopped")
    assert [r["step"] for r in after] == [r["step"] for r in before]
    keys = [key for key in before[0] if key.startswith(("train_optim/loss", "train_optim/lr", "train_rollouts/"))]
    assert [[r[k] for k in keys] for r in after] == [[r[k] for k in keys] for r in before]


def test_links_and_what_stays(runs):
    found = runs[1] / "stopped/checkpoints"
    assert sorted(os.listdir(found)) == ["final", "latest", "run.yaml", "step-10", "step-5"]
    assert os.readlink(found / "final") == os.readlink(found / "latest") == "step-10"


def test_another_run_is_refused(runs, task):
    recipe, folder = runs
    if recipe == "grpo":
        pytest.skip("the same code")
    done = task.sft(folder / "stopped", *RECIPES[recipe], *KEEP, RESUME, "model.optim.weight_decay=0.5")
    assert done.code == 2 and len(done.error_lines) == 1
    assert "holds a run with model.optim.weight_decay=" in done.error_lines[0]
    assert "this one has model.optim.weight_decay=0.5" in done.error_lines[0]


def test_on_another_layout(runs, task, world):
    """Two tensor-parallel ranks go on where one stopped: to rounding."""
    recipe, folder = runs
    if recipe == "grpo":
        pytest.skip(
            "a token sampled otherwise by rounding is another run; optimizers are compared in tests/distributed"
        )
    start(task, recipe, folder / "moved", RESUME, "trainer.devices=2", "model.tensor_model_parallel_size=2")
    expected, found = (saved_weights(folder / name / "checkpoints/final", world) for name in ("straight", "moved"))
    for name, value in found.items():
        truth = expected[name]
        value = value[: len(truth)]  # more rows of padding under tensor parallelism
        assert (value - truth).abs().max() <= 1e-5 * truth.abs().max(), name


def test_the_checkpoint_says_what_it_is(runs):
    _, folder = runs
    info = json.loads((folder / "stopped/checkpoints/final/checkpoint.json").read_text())
    assert set(info["versions"]) == {"megatron-core", "megatron-ext", "tokenizers", "torch", "transformers"}
    assert info["config"]["exp_manager"]["resume_if_exists"] is True
    assert info["trainer"]["step"] == info["adam_step"] == 10


BACKGROUND = "exp_manager.checkpoint_callback_params.async_save=true"


def test_a_run_that_is_stopped_has_saved_when_it_says_so(task, tmp_path, monkeypatch):
    """Also in the background."""
    (tmp_path / "stop").touch()
    monkeypatch.setenv(STOP_FILE_VARIABLE, str(tmp_path / "stop"))
    done = start(task, "sft", tmp_path / "run", BACKGROUND)
    assert f"saved in {tmp_path / 'run/checkpoints/step-1'}; exp_manager.resume_if_exists" in done.out + done.err
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["latest", "run.yaml", "step-1"]
    done = start(task, "sft", tmp_path / "run", BACKGROUND, RESUME)
    assert "going on after step 1" in done.out + done.err
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2]


def test_a_run_that_is_killed_while_it_starts_can_be_started_again(task, tmp_path):
    """From the moment that its folder is there, before anything is in it, to its first steps."""
    out = tmp_path / "run"
    command = [
        "recipes/train_sft.py", "--config-name", "sft_tiny", f"data.train_path={task.data / 'sft.jsonl'}",
        f"model.tokenizer={task.data / 'tokenizer'}", f"exp_manager.explicit_log_dir={out}", *RECIPES["sft"], *KEEP, RESUME,
        "model.optim.sched.name=constant",
    ]  # fmt: skip
    for _ in range(3):
        pause, known = random.random() ** 2, len(list(out.glob("**/*")))
        with Running(*command, "trainer.sft.max_steps=1000000") as running:  # which does not end before it is killed
            running.until(lambda: len(list(out.glob("**/*"))) > known, pause=0.001)  # noqa: B023
            time.sleep(pause)
            os.killpg(running.pid, signal.SIGKILL)
    saved = [path.name.removeprefix("step-") for path in (out / "checkpoints").glob("step-*")]
    last = max((int(step) for step in saved if step.isdecimal()), default=0)
    done = run(*command, f"trainer.sft.max_steps={last + 5}")
    assert done.code == 0, done.err
    assert [r["step"] for r in metrics(out)] == list(range(1, last + 6)) and (out / "checkpoints/final").is_dir()


def test_a_second_run_in_the_folder_is_refused_and_one_after_a_crash_is_not(task, tmp_path):
    out, constant = tmp_path / "run", "model.optim.sched.name=constant"
    command = [
        "recipes/train_sft.py", "--config-name", "sft_tiny", f"data.train_path={task.data / 'sft.jsonl'}",
        f"model.tokenizer={task.data / 'tokenizer'}", f"exp_manager.explicit_log_dir={out}", *SMALL, *KEEP, RESUME, constant,
        "trainer.sft.save_interval=1", "model.global_batch_size=8", "trainer.sft.max_steps=1000000",
    ]  # fmt: skip
    with Running(*command) as first:
        first.until((out / "checkpoints/step-3").exists)
        done = task.sft(out, RESUME, "trainer.devices=2")
        (line,) = done.error_lines
        assert done.code == 2 and "Traceback" not in done.err
        assert f"is held by another run: process {first.pid} on {socket.gethostname()} since 2" in line
        known = len(metrics(out))
        first.until(lambda: len(metrics(out)) >= known + 3)  # it is left alone
        os.kill(first.pid, signal.SIGKILL)
    last = int(os.readlink(out / "checkpoints/latest").removeprefix("step-"))
    done = task.sft(out, *KEEP, RESUME, constant, f"trainer.sft.max_steps={last + 2}")
    assert done.code == 0 and f"going on after step {last}" in done.out + done.err, done.err
    assert [row["step"] for row in metrics(out)] == list(range(1, last + 3))
    assert not (out / ".lock").exists()


def test_a_run_goes_on_by_what_it_holds_whatever_that_is_called(task, tmp_path):
    """Its data moved, its tokenizer and the model that it began with gone; edited data is refused, and nothing is touched."""
    out, data, start_from = tmp_path / "run", tmp_path / "data.jsonl", tmp_path / "start"
    shutil.copy(task.data / "sft.jsonl", data)
    shutil.copytree(task.checkpoint, start_from)
    more = [
        *KEEP, "model.tokenizer=null", f"pretrained_checkpoint.restore_from_path={start_from}",
        "model.optim.sched.name=constant",
    ]  # fmt: skip
    done = task.sft(out, *more, f"data.train_path={data}", "trainer.sft.max_steps=2")
    assert done.code == 0, done.err
    moved = data.rename(tmp_path / "moved.jsonl")
    shutil.rmtree(start_from)
    more += [RESUME, f"data.train_path={moved}", "trainer.sft.max_steps=4"]
    done = task.sft(out, *more)
    assert done.code == 0 and "going on after step 2" in done.out + done.err, done.err
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = task.sft(out, *more, "trainer.sft.max_steps=3")
    (line,) = done.error_lines
    assert done.code == 2 and "holds a run of 4 steps, more than the 3 of this one: set max_steps to as many" in line
    rows = [json.loads(line) for line in moved.read_text().splitlines()]
    number = random.randrange(len(rows))
    rows[number]["response"] += " "
    moved.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = task.sft(out, *more, "trainer.sft.max_steps=6")
    (line,) = done.error_lines
    assert done.code == 2 and f"data.train_path={moved} holds other rows than when the run began" in line
    assert f"row {number + 1} ({moved}:{number + 1}) is the first that differs" in line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_from_before_checkpoints_had_digests_goes_on(tmp_path):
    """See the fixture's README; losses agree with those of the run that was not stopped."""
    folder = shutil.copytree(ROOT / "tests/fixtures/run_of_2026_11", tmp_path / "old")
    expected = metrics(folder / "run")
    script, *overrides = re.search(r"python (recipes/.*)", (folder / "README.md").read_text(), re.S)[1].split()
    command = [sys.executable, ROOT / script, *(o for o in overrides if o != "\\"), RESUME]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "going on after step 2" in done.stdout + done.stderr, done.stderr
    assert done.stderr.count("run/checkpoints/step-2 was saved before checkpoints said what their run had read") == 1
    found = metrics(folder / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for row, other in zip(found, expected, strict=True):
        assert row["train_optim/loss"] == pytest.approx(other["train_optim/loss"], rel=1e-5)
    info = json.loads((folder / "run/checkpoints/final/checkpoint.json").read_text())
    assert info["contents"].keys() == {"model.tokenizer", "data.train_path"}


def test_a_monitor_that_is_no_metric_is_refused(task, tmp_path):
    held_out = shutil.copy(task.data / "sft.jsonl", tmp_path)
    done = task.sft(
        tmp_path / "run", "trainer.sft.val_check_interval=1", f"data.validation_path={held_out}",
        "exp_manager.checkpoint_callback_params.monitor=val_loss",
    )  # fmt: skip
    (line,) = done.error_lines
    assert done.code == 2 and "monitor=val_loss is no metric of this run; there are " in line and "val/loss" in line
