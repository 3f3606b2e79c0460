"""Which checkpoint of a run is its best, whatever is still on disk."""

from __future__ import annotations

import math

import pytest

from megatron_ext.runtime.checkpoint import read_checkpoint_info
from recipes.run.checkpoints import Checkpoints
from recipes.run.settings import CheckpointCallbackSection
from tests.harness import ROOT

OLD = ROOT / "tests/fixtures/run_of_2026_11/run"


@pytest.mark.parametrize(("mode", "seen"), [("min", [3.0, 2.0, 2.0, 2.0, 2.0]), ("max", [3.0, 3.0, 3.0, 5.0, 5.0])])
def test_the_best_so_far(mode, seen, tmp_path):
    """Of 3, 2, nothing, 5 and infinity."""
    found, best = [], None
    checkpoints = Checkpoints(tmp_path, CheckpointCallbackSection(monitor="val/mine", mode=mode))
    for value in (3.0, 2.0, None, 5.0, math.inf):
        best = checkpoints.best_of({} if value is None else {"val/mine": value}, best)
        found.append(best)
    assert found == seen
    assert Checkpoints(tmp_path, CheckpointCallbackSection()).best_of({"val/mine": 1.0}, None) is None


def test_a_run_that_goes_on_knows_the_best_that_is_gone(tmp_path):
    """What its checkpoint says; one from before checkpoints said it: the best of those that are there."""
    checkpoints = Checkpoints(OLD, CheckpointCallbackSection(monitor="train_optim/loss"))
    info = read_checkpoint_info(checkpoints.newest())
    losses = [known["trainer"]["metrics"]["train_optim/loss"] for known in checkpoints.complete().values()]
    assert "best" not in info["trainer"] and checkpoints.best_known(info) == min(losses)
    assert checkpoints.best_known(info | {"trainer": info["trainer"] | {"best": 0.25}}) == 0.25
    assert Checkpoints(tmp_path, checkpoints.settings).best_known(info) is None
