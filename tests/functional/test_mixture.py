"""Recipes on a mixture of JSONL and parquet, whose keys are those of other programs."""

from __future__ import annotations

import json

import pytest
from pyarrow import Table, parquet

from tests.recipe_runs import Task, metrics

pytestmark = pytest.mark.functional


def mixture(task: Task, folder, file: str) -> list[str]:
    """Halves of a task's file: one as it is, one as a table with other names."""
    rows = [json.loads(line) for line in (task.data / file).read_text().splitlines()]
    half = len(rows) // 2
    (folder / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:half]))
    theirs = [{"question" if key == "prompt" else key: value for key, value in row.items()} for row in rows[half:]]
    parquet.write_table(Table.from_pylist(theirs), folder / "two.parquet")
    one, two = (
        f"one:{{path:{folder}/one.jsonl,weight:1}}",
        f"two:{{path:{folder}/two.parquet,weight:3,fields:{{prompt:question}}}}",
    )
    return ["data.train_path=null", f"data.train_sets={{{one},{two}}}"]


def test_a_streamed_mixture_goes_on_where_it_stopped(task, tmp_path):
    """Read when it is drawn; from memory: tests/unit/recipes/data/test_mixture.py."""
    sets = [*mixture(task, tmp_path, "sft.jsonl"), "model.optim.sched.name=constant", "data.streaming=true"]
    whole = task.sft(tmp_path / "whole", *sets)
    assert whole.code == 0, whole.err
    begun = task.sft(tmp_path / "parts", *sets, "trainer.sft.max_steps=1")
    assert begun.code == 0, begun.err
    ended = task.sft(tmp_path / "parts", *sets, "exp_manager.resume_if_exists=true")
    assert ended.code == 0, ended.err
    losses = [[r["train_optim/loss"] for r in metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_grpo_trains_on_a_mixture(task, tmp_path):
    done = task.grpo(tmp_path / "run", *mixture(task, tmp_path, "train.jsonl"), "trainer.grpo.max_steps=1")
    assert done.code == 0, done.err
    contents = json.loads((tmp_path / "run/checkpoints/final/checkpoint.json").read_text())["contents"]
    assert [contents[f"data.train_sets.{name}.path"]["rows"] for name in ("one", "two")] == [24, 24]


def test_a_run_keeps_its_rows_in_tokens_and_goes_from_easy_to_hard(task, tmp_path):
    """Made once by two ranks, and not again where it goes on; the same numbers as without. Rows of one prompt come together."""
    rows = [json.loads(line) for line in (task.data / "sft.jsonl").read_text().splitlines()]

    def told(run):
        return [line for line in run.err.splitlines() if line.startswith("tokens of ") and "kept in" in line]

    text = "".join(json.dumps({**row, "difficulty": i, "meta": "x" * 400}) + "\n" for i, row in enumerate(rows * 40))
    (tmp_path / "rows.jsonl").write_text(text)
    given = [
        f"data.train_path={tmp_path / 'rows.jsonl'}", "model.optim.sched.name=constant",
        "data.curriculum={bins: 2, steps: 2}", "data.keep_together=true",
    ]  # fmt: skip
    plain = task.sft(tmp_path / "plain", *given, "data.token_processes=0")
    assert plain.code == 0 and told(plain) == [], plain.err
    begun = task.sft(tmp_path / "kept", *given, "trainer.sft.max_steps=2")
    (line,) = told(begun)
    assert begun.code == 0 and f"{len(rows) * 40} rows, made in" in line, begun.err
    ended = task.sft(tmp_path / "kept", *given, "exp_manager.resume_if_exists=true")
    assert ended.code == 0 and told(ended) == [line], ended.err
    losses = [[r["train_optim/loss"] for r in metrics(tmp_path / name)] for name in ("plain", "kept")]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert len(list((tmp_path / "kept/tokens").iterdir())) == 1
