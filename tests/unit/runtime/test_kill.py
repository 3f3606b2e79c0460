"""A save that is killed at any moment leaves the last complete checkpoint, and the next run goes on from it."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from megatron_ext.models import build_gpt
from megatron_ext.runtime.checkpoint import read_checkpoint_info, remove_unfinished, save_checkpoint
from recipes.run.checkpoints import Checkpoints
from recipes.run.settings import CheckpointCallbackSection
from tests.children import Children
from tests.gpt_cases import small_config

pytestmark = pytest.mark.kills

KILLS = 20


@pytest.fixture
def children():
    with Children("saver") as found:
        yield found


def test_a_kill_at_any_moment(children, tmp_path: Path):
    rng, newest, unfinished, took, kills = random.Random(), 0, 0, None, 0
    checkpoints = Checkpoints(tmp_path, CheckpointCallbackSection())
    # How many of them meet a save is a matter of luck, and of what else the machine does.
    while kills < KILLS or (unfinished <= KILLS / 4 and kills < 10 * KILLS):
        kills += 1
        child = children.start(tmp_path)
        assert children.said() == ["ready", str(newest)], "what was complete has been lost"
        began = time.monotonic()
        if took is None:  # the first is left alone until it has saved once
            assert children.said() == ["saved", "1"]
            took, newest = time.monotonic() - began, 1
        time.sleep(rng.random() * took)
        children.kill(child)
        while (said := children.said()) != ["gone"]:
            newest = int(said[1])
        complete = checkpoints.complete()
        assert max(complete) in (newest, newest + 1), "a kill between the rename and the word of it is the only excuse"
        newest = max(complete)
        assert all(info["trainer"]["step"] == step for step, info in complete.items())
        assert json.loads((tmp_path / "checkpoints/latest/checkpoint.json").read_text())["trainer"]["step"] in complete
        assert read_checkpoint_info(checkpoints.newest()) == complete[newest]
        unfinished += any((tmp_path / "checkpoints").glob("*.unfinished*"))
    assert unfinished > KILLS / 4, "no kill came in the midst of a save: nothing was tested"


def test_a_kill_while_an_old_checkpoint_is_removed(world, tmp_path: Path, monkeypatch):
    """What is left of it is not taken for a checkpoint."""
    checkpoints = Checkpoints(tmp_path, CheckpointCallbackSection(save_top_k=1))
    model = build_gpt(small_config(), world)
    for step in (1, 2):
        save_checkpoint(checkpoints.path(step), model, {"trainer": {"step": step, "metrics": {}}})

    def killed(folder: Path) -> None:
        (folder / "checkpoint.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.run.checkpoints.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.arrange(2, ended=False)
    monkeypatch.undo()
    assert list(checkpoints.complete()) == [2]
    remove_unfinished(checkpoints.folder)
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step-2", "latest"}
