"""Runs that are ill: steps left out, batches kept for trying again, hangs that are told and end."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from tests.alive import gone
from tests.recipe_runs import metrics

pytestmark = pytest.mark.functional

NO_STEP = ["trainer.health.skip_above=1e-9", "trainer.health.max_skipped=1"]


def test_a_batch_that_grpo_could_not_go_on_with_is_tried_again(task, tmp_path):
    """Two data-parallel ranks. The checkpoint has the weights that the batch met, and a replay finds the same gradient."""
    done = task.grpo(tmp_path / "run", "trainer.devices=2", *NO_STEP)
    assert done.code == 2
    (line,) = done.error_lines
    batch, weights = tmp_path / "run/failed/step-000002.jsonl.zst", tmp_path / "run/checkpoints/step-2"
    assert "above 1e-09 (trainer.health.skip_above) 2 times in a row: the step was not taken" in line
    assert f"the batch of step 2 is in {batch}, the weights as they are in {weights}" in line
    (row,) = metrics(tmp_path / "run")
    assert row["train_optim/skipped"] == 1 and row["train_optim/grad_norm"] > 1e-9
    again = task.grpo(
        tmp_path / "again", f"trainer.grpo.rollout={{source: file, path: {batch}}}", "data.train_path=null",
        f"pretrained_checkpoint.restore_from_path={weights}", "trainer.grpo.max_steps=1", "trainer.devices=2",
    )  # fmt: skip
    assert again.code == 0, again.err
    (row,) = metrics(tmp_path / "again")
    assert row["train_optim/skipped"] == 0
    assert f"the gradient norm is {row['train_optim/grad_norm']:.4g}, above" in line
    gone_on = task.grpo(
        tmp_path / "run", "trainer.devices=2", "exp_manager.resume_if_exists=true", "trainer.health.skip_above=null"
    )
    assert gone_on.code == 0, gone_on.err
    assert [(r["step"], r["train_optim/skipped"]) for r in metrics(tmp_path / "run")] == [(1, 1), (3, 0)]


def test_rows_that_sft_could_not_go_on_with_are_kept_as_they_were(task, tmp_path):
    done = task.sft(
        tmp_path / "run", "trainer.devices=2", "trainer.health.skip_above=1e-9", "trainer.health.max_skipped=0"
    )
    assert done.code == 2
    batch = tmp_path / "run/failed/step-000001.jsonl"
    assert f"the batch of step 1 is in {batch}" in done.error_lines[0]
    kept = [json.loads(line) for line in batch.read_text().splitlines()]
    known = [json.loads(line) for line in (task.data / "sft.jsonl").read_text().splitlines()]
    assert len(kept) == 8 and all(row in known for row in kept)
    again = task.sft(tmp_path / "again", f"data.train_path={batch}", "trainer.sft.max_steps=1", "trainer.devices=2")
    assert again.code == 0, again.err
    norm = metrics(tmp_path / "again")[0]["train_optim/grad_norm"]
    assert f"the gradient norm is {norm:.4g}, above" in done.error_lines[0]


def test_an_environment_that_hangs_ends_the_run_and_is_named(task, tmp_path):
    """Tensor-parallel ranks: one asks the environment, the other waits for it in a collective."""
    done = task.grpo(
        tmp_path / "run", "model.tensor_model_parallel_size=2", "trainer.devices=2", "trainer.grpo.environment_timeout=5",
        "trainer.grpo.environment=tests.programs.hanging_environment.Hanging",
    )  # fmt: skip
    assert done.code == 2
    (line,) = done.error_lines
    assert "Hanging: step has not come back within trainer.grpo.environment_timeout=5 s, for the prompt of " in line
    assert f"{task.data / 'train.jsonl'}:" in line and not (tmp_path / "run/hang-rank-0.txt").exists()


def test_environments_that_hang_are_given_up_and_the_run_goes_on(task, tmp_path):
    """In a loop of C; nothing is left of them nor of the others."""
    file = tmp_path / "pids"
    done = task.grpo(
        tmp_path / "run", "trainer.devices=2", "trainer.grpo.environment_timeout=2", "trainer.grpo.on_reward_timeout=zero",
        f"trainer.grpo.environment={{name: tests.programs.hanging_environment.Sometimes, file: {file}}}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "the conversation is given up" in done.err + done.out
    rows = metrics(tmp_path / "run")
    pids = {*map(int, file.read_text().split())}
    lost = len(pids) / len(rows) * sum(row["train_rollouts/reward_timeouts"] for row in rows)
    assert len(rows) == 3 and 1.99 <= lost <= len(pids)
    assert gone(*pids)


def test_a_rank_that_hangs_ends_the_run_and_is_named(task, tmp_path):
    """Tensor-parallel ranks: one never comes back from the user's own function, the other waits for it in a collective."""
    done = task.grpo(
        tmp_path / "run", "model.tensor_model_parallel_size=2", "trainer.devices=2", "trainer.health.hang_seconds=8",
        "trainer.grpo.objective={name: grpo, advantages: tests.programs.own_objective.hangs_on_rank_0}",
    )  # fmt: skip
    assert done.code != 0
    told = [line for line in done.err.splitlines() if "no rank has done anything for 8 s" in line]
    assert told and all("rank 0 in generate (own_objective.py:" in line and "rank 1 in " in line for line in told)
    stacks = (tmp_path / "run/hang-rank-0.txt").read_text()
    assert 'own_objective.py", line ' in stacks and "in hangs_on_rank_0" in stacks and "in run_step" in stacks
    beat = json.loads((tmp_path / "run/heartbeat.json").read_text())
    assert beat["step"] == 1 and beat["phase"] == "generate" and beat["seconds_since_progress"] > 2


def test_a_window_of_steps_is_profiled(task, tmp_path):
    done = task.sft(tmp_path / "run", "trainer.devices=2", "trainer.profile={start_step: 2, steps: 2, ranks: [1]}")
    assert done.code == 0, done.err
    place = tmp_path / "run/profile"
    assert sorted(path.name for path in place.iterdir()) == ["step-2-to-3-rank-1.json.gz", "step-2-to-3-rank-1.txt"]
    events = json.loads(gzip.decompress((place / "step-2-to-3-rank-1.json.gz").read_bytes()))["traceEvents"]
    steps = [e for e in events if e.get("name") == "aten::_fused_adam_" or "Optimizer.step" in e.get("name", "")]
    assert len(steps) == 2 and "aten::mm" in (place / "step-2-to-3-rank-1.txt").read_text()
    for profile, words in [
        ("{memory: true}", "trainer.profile.memory=true records what a GPU allocates, and there is none"),
        ("{ranks: [1]}", "trainer.profile.ranks names 1, and the run has ranks 0 to 0"),
    ]:
        refused = task.sft(tmp_path / "other", "trainer.devices=1", f"trainer.profile={profile}")
        assert refused.code == 2 and words in refused.error_lines[0] and not (tmp_path / "other/metrics.jsonl").exists()


def test_a_spike_is_told_with_the_rows_of_its_step(task, tmp_path):
    """Of two data-parallel ranks; from the 21st step on, and a window that the run does not reach is told as well."""
    done = task.sft(
        tmp_path / "run", "trainer.devices=2", "trainer.sft.max_steps=22", "trainer.health.spike=1e-6",
        "trainer.profile={start_step: 23}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "nothing is profiled: trainer.profile.start_step=23 is none of the steps to be taken" in done.out
    told = [line for line in done.out.splitlines() if line.startswith("a spike at step ")]
    assert {line.split()[4].rstrip(":") for line in told} <= {"21", "22"} and told
    (row,) = [r for r in metrics(tmp_path / "run") if r["step"] == 21]
    assert f"train_optim/loss is {row['train_optim/loss']:.4g}, the median of the 20 steps before " in told[0]
    rows = told[0].rpartition(" (")[2].removesuffix(")").split(", ")
    assert len(set(rows)) == len(rows) == 8
    assert all(re.fullmatch(re.escape(str(task.data / "sft.jsonl")) + r":\d+", place) for place in rows)


def test_a_run_that_ends_says_so_in_its_heartbeat(task, tmp_path):
    done = task.sft(tmp_path / "run", "trainer.devices=1")
    assert done.code == 0, done.err
    beat = json.loads((tmp_path / "run/heartbeat.json").read_text())
    assert (beat["step"], beat["phase"]) == (3, "ended") and beat["progress"] > 6
    assert not list((tmp_path / "run").glob("hang-*")) and {
        r["train_optim/skipped"] for r in metrics(tmp_path / "run")
    } == {0}
