"""GRPO on one node of a real Slurm, with a real vLLM on another, which is killed on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.recipe_runs import Task, metrics, run
from tests.slurm_cluster import started
from tests.vllm_cases import NEEDS_VLLM, PYTHON

pytestmark = [pytest.mark.functional, pytest.mark.vllm, NEEDS_VLLM]

HEADS = [
    "model.hidden_size=64",
    "model.num_attention_heads=2",
]  # the least that the server for CPUs takes is a head of 32
SECONDS = 600.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with started(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def servers(meeting: Path) -> list[psutil.Process]:
    """Those that answer HTTP, children of what watches them."""
    found = []
    for process in psutil.process_iter():
        try:
            line, watcher = process.cmdline(), process.parent()
            ours = any(part.startswith(f"{meeting}/") for part in line) and "vllm.entrypoints.openai.api_server" in line
            if ours and watcher is not None and any(part.endswith("guard.py") for part in watcher.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


def test_a_server_on_another_node(cluster, tmp_path):
    task = Task(tmp_path / "task")
    made = run("tools/make_word_problems.py", "--out", task.data, "--seed", 5, "--sft", 64, "--train", 48, "--test", 8)
    assert made.code == 0, made.err
    done = task.sft(task.folder / "sft", *HEADS)
    assert done.code == 0, done.err
    out = tmp_path / "it's a run"
    settings = [s for s in task.grpo_overrides(out) if not s.startswith(("exp_manager.", "trainer.grpo.max_steps"))]
    job = cluster.start(
        "train_grpo", "grpo_tiny", out, *settings, *HEADS, "trainer.grpo.max_steps=6",
        f"trainer.grpo.rollout={{source: vllm, start: 1, python: {PYTHON}, arguments: [--enforce-eager]}}",
        nodes=["--nodes", "1", "--gpus-per-node", "0", "--processes", "1", "--vllm-nodes", "1"],
    )  # fmt: skip
    meeting = Path(f"{out}.slurm/vllm-{job.number}-0")
    job.until(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) >= 2, SECONDS)
    (server,) = servers(meeting)
    os.kill(server.pid, signal.SIGKILL)
    job.until(lambda: job.state == "COMPLETED", SECONDS)
    assert [row["step"] for row in metrics(out)] == list(range(1, 7))
    assert max(row["train_optim/sampler_logprob_diff"] for row in metrics(out)) < 1e-4
    assert "node2 serves" in job.log and "it is started again (1 of 3 times) with v0000" in job.log
    assert (meeting / "machines").read_text() == "node2\n"
    job.until(lambda: not servers(meeting))
    assert not (meeting / "serve.json").exists() and not list(meeting.glob("megatron-ext-*")), (
        "weights were left behind"
    )
