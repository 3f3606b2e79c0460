"""The table of metrics holds what trainers write, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

from recipes.run.metrics import METRICS, in_order, key_of, unknown_metrics

ROOT = Path(__file__).resolve().parents[4]


def words() -> set[str]:
    """Every literal text in the code that trains, f-strings' parts included."""
    found = set()
    for folder in ("recipes", "megatron_ext/losses", "megatron_ext/runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "metrics.py" or "runtime" in path.parts:
                tree = ast.parse(path.read_text(encoding="utf-8"))
                found |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


def test_every_metric_of_the_table_is_written_somewhere():
    """By its whole name, or by the name that a loss, an engine or a timer knows."""
    known = words()
    names = [name.removesuffix("/*") for name in METRICS]
    assert not [name for name in names if name not in known and name.rpartition("/")[2] not in known]


def test_a_name_that_the_table_lacks_is_found():
    assert unknown_metrics(["train_optim/loss", "train_optim/lost", "timers/step"]) == ["train_optim/lost"]


def test_names_of_the_users_are_known_below_theirs():
    assert not unknown_metrics(["train_rollouts/reward/mine", "val_rollouts/reward/a-b"])
    assert unknown_metrics(["train_rollouts/turns/mine", "reward/mine"]) == ["reward/mine", "train_rollouts/turns/mine"]


def test_every_metric_has_a_writer_a_unit_and_a_meaning():
    assert all(m.recipes and m.unit and m.meaning.endswith(".") for m in METRICS.values())


def test_names_of_the_users_stand_where_their_kind_does():
    assert key_of("val_rollouts/reward/mine") == "val_rollouts/reward/*"
    assert key_of("val_rollouts/mine/reward") == "val_rollouts/*"
    order = ["train_rollouts/reward", "train_rollouts/reward/a", "train_rollouts/reward/b", "timers/step", "zz/mine"]
    assert in_order(reversed(order)) == order
    keys = [key for key in METRICS if not key.endswith("*")]
    assert in_order(reversed(keys)) == keys
