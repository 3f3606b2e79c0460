"""Several rewards in a run, those that hang, and a server that dies: what is logged, written down and trained on."""

from __future__ import annotations

import json
import math

import pytest

from megatron_ext.ports import free_port
from recipes.grpo.dump_files import read_step, step_files
from tests.recipe_runs import Running, metrics
from tests.unit.recipes.rewards.cases import served

pytestmark = pytest.mark.functional

OWN = "tests.programs.own_rewards"
TIMES = ("timers/", "train_optim/tokens_per_second")


def rows_of(task, path, *more: dict):
    """The first rows of the task, with something more in each."""
    rows = [json.loads(line) for line in (task.data / "train.jsonl").read_text().splitlines()]
    path.write_text("".join(json.dumps(row | extra) + "\n" for row, extra in zip(rows, more, strict=False)))
    return f"data.train_path={path}"


def rows_apart(task, folder) -> list[str]:
    """Rows of two sources, and others to validate with."""
    rows = [json.loads(line) for line in (task.data / "train.jsonl").read_text().splitlines()]
    parts = {"train": rows[12:], "validation": rows[:12]}
    for name, part in parts.items():
        lines = (json.dumps(row | {"data_source": "ab"[i % 2]}) + "\n" for i, row in enumerate(part))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return [f"data.{name}_path={folder / name}.jsonl" for name in parts]


def trained(out) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMES)} for row in metrics(out) if "train_optim/loss" in row
    ]


def test_several_rewards_by_the_source_of_rows(task, tmp_path):
    """What the log says of each is what the rollouts hold, and the advantages are those of the weighted sums."""
    rewards = (
        "{size:{reward:{name:length,target:12},weight:0.5},long:{reward:"
        + OWN
        + ".plain,weight:-0.25,data_sources:[a]},"
        "b:{reward:{name:" + OWN + ".scaled,alpha:2},data_sources:[b,c]}}"
    )
    done = task.grpo(
        tmp_path / "run", *rows_apart(task, tmp_path), "trainer.grpo.reward=null", f"+trainer.grpo.rewards={rewards}",
        "+trainer.grpo.rollout_dump={}", "trainer.grpo.val_check_interval=3",
    )  # fmt: skip
    assert done.code == 0, done.err
    for row in trained(tmp_path / "run"):
        dump = read_step(step_files(tmp_path / "run/rollouts")[row["step"]])
        found: dict[str, list[float]] = {"size": [], "long": [], "b": []}
        totals = []
        for _, group in dump.groups:
            weights = {"size": 0.5} | ({"long": -0.25} if group["row"]["data_source"] == "a" else {"b": 1.0})
            sums = []
            for response in group["responses"]:
                assert response["rewards"].keys() == weights.keys()
                length = len(response["text"])
                assert (
                    response["rewards"].get("long", length) == length
                    and response["rewards"].get("b", 2 * length) == 2 * length
                )
                sums.append(sum(weights[name] * value for name, value in response["rewards"].items()))
                assert response["reward"] == pytest.approx(sums[-1], rel=1e-12, abs=1e-12)
                for name, value in response["rewards"].items():
                    found[name].append(value)
            mean = sum(sums) / len(sums)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in sums) / (len(sums) - 1))
            wanted = [(x - mean) / (deviation + 1e-6) for x in sums]
            assert [r["advantage"] for r in group["responses"]] == pytest.approx(wanted, rel=1e-6, abs=1e-6)
            totals += sums
        assert row["train_rollouts/reward"] == pytest.approx(sum(totals) / 16)
        for name, values in found.items():
            if values:
                assert row[f"train_rollouts/reward/{name}"] == pytest.approx(sum(values) / len(values))
            else:
                assert f"train_rollouts/reward/{name}" not in row
    last = metrics(tmp_path / "run")[-1]
    assert {name for name in last if name.startswith("val_rollouts/reward")} == {
        "val_rollouts/reward", *(f"val_rollouts/reward/{name}" for name in ("size", "long", "b")),
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reward_that_hangs_never_hangs_the_run(task, tmp_path, ranks):
    """Refused with its row; 0, and its group teaches nothing; or left out of the step as if it were not there."""
    data = rows_of(task, tmp_path / "rows.jsonl", {}, {}, {"hang": True}, {})
    settings = [
        data, f"trainer.grpo.reward={OWN}.hangs_on_row", "+trainer.grpo.reward_timeout=1", "trainer.grpo.max_steps=1",
        f"trainer.devices={ranks}",
    ]  # fmt: skip
    done = task.grpo(tmp_path / "refuse", *settings)
    (line,) = done.error_lines
    assert (
        done.code == 2
        and f"within trainer.grpo.reward_timeout=1 s for one of 4 responses to the prompt of {tmp_path}/rows.jsonl:3:"
        in line
    )
    for value in ("zero", "drop"):
        out = tmp_path / value
        done = task.grpo(out, *settings, f"+trainer.grpo.on_reward_timeout={value}", "+trainer.grpo.rollout_dump={}")
        assert done.code == 0, done.err
        (row,) = trained(out)
        groups = {group["line"]: group["responses"] for _, group in read_step(step_files(out / "rollouts")[1]).groups}
        assert [r["reward"] for r in groups[3]] == [0.0 if value == "zero" else None] * 4
        assert [r["advantage"] for r in groups[3]] == [0.0] * 4 and any(r["advantage"] for r in groups[1])
        known = [r["reward"] for group in groups.values() for r in group if r["reward"] is not None]
        assert row["train_rollouts/reward"] == pytest.approx(sum(known) / (16 if value == "zero" else 12))
        assert row["train_rollouts/reward_timeouts"] == 0.25 and row.get("train_rollouts/dropped_groups", 0.25) == 0.25
        assert row["train_optim/ratio"] == pytest.approx(1)  # all weight lies on what is trained
        assert f"for responses to the prompt of {tmp_path}/rows.jsonl:3:" in done.err


def test_a_reward_server_that_is_killed_and_started_again(task, tmp_path):
    """The run waits, goes on, and is the run that asked nobody."""
    spec = f"{{name: {OWN}.Gate, folder: {tmp_path}, calls: 5}}"  # of the first step, which has four prompts, and one
    port, out = free_port(), tmp_path / "run"
    command = ["recipes/train_grpo.py", "--config-name", "grpo_tiny", *task.grpo_overrides(out), "trainer.devices=1"]
    with served("--reward", spec, port=port, url_file=tmp_path / "first") as (server, url):
        with Running(*command, "trainer.grpo.reward=http", MEGATRON_EXT_REWARD_URL=url) as running:
            running.until((tmp_path / "asked").exists)
            server.kill()
            server.wait()
            running.until(lambda: "the run waits, up to 1500 s" in running.said()[1])
            (tmp_path / "open").touch()
            with served("--reward", spec, port=port, url_file=tmp_path / "second"):
                done = running.wait(600)
    assert done.code == 0 and "answers again after" in done.err, done.err
    alone = task.grpo(tmp_path / "alone", f"trainer.grpo.reward={OWN}.plain", "trainer.devices=1")
    assert alone.code == 0, alone.err
    assert trained(out) == trained(tmp_path / "alone")
