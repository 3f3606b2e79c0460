"""Tools that read a run's metrics.jsonl say what is in it."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
import torch

from tests.recipe_runs import run

STEPS, TIMERS = 24, ("generate", "actor_update", "rollout_dump")


def log(folder: Path, rng: torch.Generator) -> list[dict[str, float]]:
    """Of a run with validations after steps 0, 12 and 24."""

    def draw() -> float:
        return torch.rand((), generator=rng).item()

    rows: list[dict[str, float]] = [{"step": 0, "val_rollouts/reward": draw(), "timers/validation": 50.0}]
    for step in range(1, STEPS + 1):
        names = ("train_rollouts/reward", "train_rollouts/response_length", "train_optim/kl")
        row = {"step": step} | {name: draw() for name in names} | {f"timers/{name}": draw() for name in TIMERS}
        row["timers/step"] = sum(row[f"timers/{name}"] for name in TIMERS) + 1
        rows.append(row | ({"val_rollouts/reward": draw(), "timers/validation": 50.0} if step % 12 == 0 else {}))
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def cells(text: str) -> dict[str, list[str]]:
    """The other cells of a table's rows by their first one, of all tables."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in lines}


def test_the_curve_of_several_seeds(tmp_path, rng):
    folders = [tmp_path / name for name in ("one", "two", "three")]
    runs = [log(folder, rng) for folder in folders]
    done = run("tools/reward_curve.py", *folders, "--every", 10, "--last", 4, "--held-out", 100)
    assert done.code == 0, done.err
    found = cells(done.out)
    for first, last in ((1, 10), (11, 20), (21, 24)):
        rows = [row for rows in runs for row in rows if first <= row["step"] <= last]
        for column, name in (
            (0, "train_rollouts/reward"),
            (1, "train_rollouts/response_length"),
            (5, "train_optim/kl"),
        ):
            mean = statistics.fmean(row[name] for row in rows)
            assert found[f"{first} to {last}"][column] == f"{mean:.3f}"
    for step in (0, 12, 24):
        values = [next(row["val_rollouts/reward"] for row in rows if row["step"] == step) for rows in runs]
        assert found[str(step)] == [f"{p:.3f} ± {(p * (1 - p) / 100) ** 0.5:.3f}" for p in values]
    ends = [statistics.fmean(row["train_rollouts/reward"] for row in rows[-4:]) for rows in runs]
    shown = [f"{x:.3f}" for x in ends] + [f"{statistics.fmean(ends):.4f}", f"{statistics.stdev(ends):.4f}"]
    assert found["train_rollouts/reward"] == shown


def test_the_shares_of_a_step_add_up(tmp_path, rng):
    rows = log(tmp_path / "run", rng)[1:]
    done = run("tools/step_phases.py", tmp_path / "run", "--skip", 4)
    assert done.code == 0, done.err
    found = cells(done.out)
    for name in ("step", *TIMERS):
        seconds = statistics.fmean(row[f"timers/{name}"] for row in rows[4:])
        assert found[name][0].startswith(f"{seconds:.2f} s, ")
    assert found["the rest"][0].startswith("1.00 s, ") and "validation" not in found
    shares = [
        float(re.search(r", ([\d.]+)%", cell)[1]) for name, (cell,) in found.items() if "%" in cell and name != "step"
    ]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_what_is_no_run_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "train_optim/loss": 2.0}\n')
    for tool, message in (
        ("reward_curve", "is no run of GRPO"),
        ("step_phases", "has no timers/step behind the first 2"),
    ):
        bad = run(f"tools/{tool}.py", tmp_path / "empty")
        assert bad.code == 2 and message in bad.error_lines[0]
    assert "has no metrics.jsonl" in run("tools/step_phases.py", tmp_path).error_lines[0]
