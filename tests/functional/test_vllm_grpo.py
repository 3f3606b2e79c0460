"""GRPO on responses of a real vLLM, which is killed on the way."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.recipe_runs import Running, Task, metrics, run
from tests.vllm_cases import NEEDS_VLLM, PYTHON

pytestmark = [pytest.mark.functional, pytest.mark.vllm, NEEDS_VLLM]

# The least that the server for CPUs takes is a head of 32.
HEADS = ["model.hidden_size=64", "model.num_attention_heads=2"]


def wait_for(condition, running: Running, seconds: float):
    """What it gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert not running.ended(), running.said()[1][-3000:]
        assert time.monotonic() < deadline, f"nothing in {seconds} s: {running.said()[1][-3000:]}"
        time.sleep(0.1)
    return found


def guards(running: Running) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(running.pid).children(recursive=True):
        try:
            if any(part.endswith("guard.py") for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def steps(out: Path) -> list[int]:
    return [row["step"] for row in metrics(out) if "train_rollouts/reward" in row] if out.exists() else []


def test_a_run_goes_on_when_its_server_is_killed(tmp_path):
    """Two tensor-parallel ranks, of which the first alone asks."""
    task = Task(tmp_path)
    made = run("tools/make_word_problems.py", "--out", task.data, "--seed", 5, "--sft", 64, "--train", 48, "--test", 8)
    assert made.code == 0, made.err
    done = task.sft(tmp_path / "sft", *HEADS)
    assert done.code == 0, done.err
    out, weights = tmp_path / "grpo", tmp_path / "weights"
    command = [
        "recipes/train_grpo.py", "--config-name", "grpo_tiny", *task.grpo_overrides(out), *HEADS, "trainer.grpo.max_steps=8",
        "model.tensor_model_parallel_size=2", f"data.validation_path={task.data / 'test.jsonl'}",
        "trainer.grpo.val_check_interval=4",
        f"+trainer.grpo.rollout={{source: vllm, start: 1, python: {PYTHON}, weights_dir: {weights}, "
        "arguments: [--enforce-eager]}",
    ]  # fmt: skip
    with Running(*command) as running:
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(steps(out)) >= 3, running, 600)
        (guard,) = guards(running)
        (server,) = guard.children()
        os.kill(server.pid, signal.SIGKILL)
        finished = running.wait(600)
    assert finished.code == 0, finished.err[-3000:]
    assert steps(out) == list(range(1, 9))
    rows = metrics(out)
    assert all(math.isfinite(row["train_optim/grad_norm"]) for row in rows if "train_optim/grad_norm" in row)
    assert [row["step"] for row in rows if "val_rollouts/reward" in row] == [0, 4, 8]
    assert "it is started again (1 of 3 times)" in finished.err + finished.out
    assert not guard.is_running() and not server.is_running()
    assert not list(weights.iterdir()), "the weights of the run were left behind"
    assert "samples others than it would have" in finished.out
