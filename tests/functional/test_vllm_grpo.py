"""GRPO on responses of real vLLM servers, which are killed on the way: step after step, and ahead of training."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import psutil
import pytest

from recipes.grpo.dump_files import read_step, step_files
from tests.recipe_runs import Running, Task, metrics, run
from tests.vllm_cases import NEEDS_VLLM, PYTHON

pytestmark = [pytest.mark.functional, pytest.mark.vllm, NEEDS_VLLM]

# The least that the server for CPUs takes is a head of 32.
HEADS = ["model.hidden_size=64", "model.num_attention_heads=2"]


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


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    task = Task(tmp_path_factory.mktemp("task"))
    made = run("tools/make_word_problems.py", "--out", task.data, "--seed", 5, "--sft", 64, "--train", 48, "--test", 8)
    assert made.code == 0, made.err
    done = task.sft(task.folder / "sft", *HEADS)
    assert done.code == 0, done.err
    return task


def command(task: Task, out: Path, weights: Path, servers: int, *overrides: str) -> list[str]:
    return [
        "recipes/train_grpo.py", "--config-name", "grpo_tiny", *task.grpo_overrides(out), *HEADS,
        f"data.validation_path={task.data / 'test.jsonl'}", "trainer.grpo.val_check_interval=4",
        f"+trainer.grpo.rollout={{source: vllm, start: {servers}, python: {PYTHON}, weights_dir: {weights}, "
        "arguments: [--enforce-eager]}", *overrides,
    ]  # fmt: skip


def test_a_run_goes_on_when_its_server_is_killed(task, tmp_path):
    """Two tensor-parallel ranks, of which the first alone asks."""
    out, weights = tmp_path / "grpo", tmp_path / "weights"
    with Running(
        *command(task, out, weights, 1, "trainer.grpo.max_steps=8", "model.tensor_model_parallel_size=2")
    ) as running:
        running.until(lambda: (out / "metrics.jsonl").exists() and len(steps(out)) >= 3)
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


def ages(dump) -> dict[int, set[float]]:
    """By step, of how many steps before it the weights were that sampled; a step is an update here."""
    found = {}
    for step, path in step_files(dump).items():
        answers = [answer for _, group in read_step(path).groups for answer in group["responses"]]
        found[step] = {step - 1 - p["weight_version"] for answer in answers for p in answer["passages"]}
    return found


def test_servers_sample_ahead_of_replicas_of_two_stages(task, tmp_path):
    """Two servers, two pipeline stages, two replicas: one server is killed, the run is ended by Ctrl-C with responses in flight
    and goes on, and at last all of it is replayed without servers."""
    out, weights = tmp_path / "grpo", tmp_path / "weights"
    layout = ["trainer.devices=4", "model.pipeline_model_parallel_size=2", "trainer.grpo.rollout_dump={}"]
    ahead = ["trainer.grpo.max_staleness=2", "trainer.grpo.off_policy={}", "trainer.grpo.rollout_tokens=4096"]
    common = [*layout, *ahead, "trainer.grpo.save_interval=4"]
    with Running(*command(task, out, weights, 2, *common, "trainer.grpo.max_steps=8")) as running:
        running.until(lambda: (out / "metrics.jsonl").exists() and len(steps(out)) >= 2)
        first, second = guards(running)
        os.kill(first.children()[0].pid, signal.SIGKILL)
        running.until(lambda: len(steps(out)) >= 4)
        started = psutil.Process(running.pid).children(recursive=True)
        os.kill(running.pid, signal.SIGINT)
        finished = running.wait(600)
    assert finished.code == 130 and psutil.wait_procs(started, timeout=120)[1] == [], finished.err[-3000:]
    last = len(steps(out))
    assert f"asked to stop after step {last}: saved in" in finished.out and 4 <= last < 8
    assert "sampled by weights of up to 2 steps before, and are weighed for it" in finished.out
    again = command(task, out, weights, 1, *common, "trainer.grpo.max_steps=8", "exp_manager.resume_if_exists=true")
    with Running(*again) as running:
        finished = running.wait(600)
    assert finished.code == 0, finished.err[-3000:]
    assert not list(weights.iterdir()), "the weights of the run were left behind"
    rows = [row for row in metrics(out) if "train_rollouts/reward" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    found = ages(out / "rollouts")
    assert found[1] == {0} and found[last + 1] == {0}, "nothing is older where sampling begins"
    assert all(max(found[step]) <= 2 for step in found) and 2 in found[3] | found[4]
    assert [row["train_rollouts/staleness_max"] for row in rows] == [max(found[step]) for step in range(1, 9)]
    assert all(0 < row["train_optim/importance"] < 2 for row in rows)
    lines = [g["line"] for path in step_files(out / "rollouts").values() for _, g in read_step(path).groups]
    assert len(lines) == 32 and len(set(lines)) == 32, "each prompt of an epoch once, across the stop"
    replayed = task.grpo(
        tmp_path / "again", *HEADS, *layout, "trainer.grpo.off_policy={}", f"trainer.grpo.max_steps={last}",
        "data.train_path=null", f"++trainer.grpo.rollout={{source: file, path: {out}}}",
    )  # fmt: skip
    assert replayed.code == 0, replayed.err
    for row, copy in zip(rows[:last], metrics(tmp_path / "again"), strict=True):
        assert row["train_optim/grad_norm"] == copy["train_optim/grad_norm"], row["step"]
        assert row["train_optim/sampler_logprob_diff"] == copy["train_optim/sampler_logprob_diff"]
