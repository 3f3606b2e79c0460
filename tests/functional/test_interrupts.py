"""Ctrl-C and SIGTERM while servers sample ahead: the step in hand is taken and saved; nothing is lost, doubled or left behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from recipes.grpo.dump_files import read_step, step_files
from tests.recipe_runs import Finished, Running, metrics
from tests.vllm_uniform import Uniform, make_uniform_model, uniform_server

pytestmark = pytest.mark.functional

STEPS, PROMPTS = 6, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_uniform_model(tmp_path_factory.mktemp("uniform") / "model")


@pytest.fixture
def server(model) -> Iterator[Uniform]:
    with uniform_server(model) as server:
        yield server


def command(model: Path, out: Path, server: Uniform, ranks: int, *overrides: str) -> list[str]:
    data = out.with_name("rows.jsonl")
    rows = [{"prompt": f"what is {i % 7} + {i} ?"} for i in range(STEPS * PROMPTS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollout = f"{{source: vllm, urls: ['{server.url}'], weights_dir: {out.with_name('weights')}}}"
    return [
        "recipes/train_grpo.py", "--config-name", "grpo_tiny", "model=pretrained", f"data.train_path={data}",
        f"pretrained_checkpoint.restore_from_path={model}", f"exp_manager.explicit_log_dir={out}", f"trainer.devices={ranks}",
        f"trainer.grpo.max_steps={STEPS}", f"trainer.grpo.num_prompts_per_grpo_step={PROMPTS}",
        "trainer.grpo.samples_per_prompt=2", "model.global_batch_size=8", "model.micro_batch_size=2",
        "trainer.grpo.length_params.max_length=6", "data.max_prompt_length=64", "trainer.grpo.val_check_interval=0",
        "trainer.grpo.reward={name:length,target:12}", "model.optim.lr=1e-9", "+trainer.grpo.rollout_dump={}",
        f"+trainer.grpo.rollout={rollout}", "+trainer.grpo.max_staleness=1", *overrides,
    ]  # fmt: skip


def steps(out: Path) -> list[int]:
    return [row["step"] for row in metrics(out)] if (out / "metrics.jsonl").exists() else []


def ended(
    number: int, running: Running, server: Uniform, out: Path, times: int = 1
) -> tuple[Finished, list[psutil.Process]]:
    """Asked so often to end, with requests in flight and a step or more behind it; with whatever it had started."""
    known = len(steps(out))
    running.until(lambda: len(steps(out)) > known)
    server.gate.clear()
    running.until(lambda: server.waiting)
    started = psutil.Process(running.pid).children(recursive=True)
    for count in range(1, times + 1):
        os.kill(running.pid, number)
        if count < times:
            running.until(lambda: "once more ends it at once" in running.said()[1])
    if times == 1:
        running.until(lambda: "once more ends it at once" in running.said()[1])
        server.gate.set()
    finished = running.wait(300)
    server.gate.set()
    return finished, psutil.wait_procs(started, timeout=120)[1]


def lines(out: Path) -> list[int]:
    """Of the rows that each step was made of."""
    groups = [group for path in step_files(out / "rollouts").values() for _, group in read_step(path).groups]
    assert all(len(group["responses"]) == 2 for group in groups)
    return [group["line"] for group in groups]


def test_ctrl_c_to_ranks_and_their_parent(model, server, tmp_path):
    out, resume = tmp_path / "run", "exp_manager.resume_if_exists=true"
    with Running(*command(model, out, server, 2)) as running:
        finished, left = ended(signal.SIGINT, running, server, out)
    assert finished.code == 130 and left == [], finished.err
    known = steps(out)
    assert f"asked to stop after step {known[-1]}: saved in" in finished.out and known[-1] < STEPS
    with Running(*command(model, out, server, 2, resume)) as running:
        finished = running.wait(600)
    assert finished.code == 0 and f"going on after step {known[-1]}" in finished.out, finished.err
    assert steps(out) == list(range(1, STEPS + 1))
    assert sorted(lines(out)) == list(range(1, STEPS * PROMPTS + 1)), "each row once, across the stop"


def test_sigterm_to_a_run_in_one_process_and_a_second_one_at_once(model, server, tmp_path):
    out = tmp_path / "run"
    with Running(*command(model, out, server, 1)) as running:
        finished, left = ended(signal.SIGTERM, running, server, out)
    assert finished.code == 143 and left == [], finished.err
    last = steps(out)[-1]
    assert f"asked to stop after step {last}: saved in" in finished.out and (out / f"checkpoints/step-{last}").is_dir()
    again = tmp_path / "again"
    with Running(*command(model, again, server, 1)) as running:
        finished, left = ended(signal.SIGTERM, running, server, again, times=2)
    assert finished.code == 143 and left == [] and not list((again / "checkpoints").glob("step-*")), finished.err
