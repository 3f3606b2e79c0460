"""Which checkpoints stay and what the links say, whose a folder is, and what may change when a run goes on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from megatron_ext.runtime.checkpoint_files import self_checksum
from recipes.run.run_folder import Checkpoints, check_run_folder, claim_run_folder
from recipes.run.settings import CheckpointCallbackSection

SCHEDULES = {"constant": {"name": "constant"}, "cosine": {"name": "CosineAnnealing"}}


def describe(folder: Path, step: int, **metrics: float) -> None:
    """A checkpoint, as far as its place is concerned."""
    info = {"trainer": {"step": step, "metrics": metrics}, "files": {}}
    (folder / "weights").mkdir(parents=True)
    (folder / "checkpoint.json").write_text(
        json.dumps(info | {"checksum": self_checksum(json.loads(json.dumps(info)))})
    )


def links(checkpoints: Checkpoints) -> dict[str, str]:
    found = {path.name: path for path in checkpoints.folder.iterdir() if path.is_symlink()}
    assert all(path.exists() for path in found.values()), "a link leads nowhere"
    return {name: path.readlink().name for name, path in found.items()}


def run(tmp_path: Path, values: list[float | None], **settings) -> tuple[Checkpoints, list[str]]:
    """Save once per value of `val/x` and see what is left."""
    checkpoints = Checkpoints(tmp_path, CheckpointCallbackSection(monitor="val/x", **{"mode": "min"} | settings))
    for step, value in enumerate(values, 1):
        describe(checkpoints.path(step), step, **({} if value is None else {"val/x": value}))
        checkpoints.arrange(step, ended=step == len(values))
    return checkpoints, sorted(p.name for p in checkpoints.folder.glob("step-*"))


@pytest.mark.parametrize(("mode", "best"), [("min", min), ("max", max)])
def test_the_best_stay_and_are_linked(tmp_path, mode, best):
    values = random.sample(range(1000), 8)
    checkpoints, left = run(tmp_path, values, mode=mode, save_top_k=3)
    ranked = sorted(range(1, 9), key=lambda step: values[step - 1], reverse=mode == "max")
    assert left == sorted(f"step-{step}" for step in {*ranked[:3], 8})
    assert links(checkpoints) == {
        "latest": "step-8",
        "final": "step-8",
        "best": f"step-{values.index(best(values)) + 1}",
    }


def test_what_is_no_number_is_never_the_best(tmp_path):
    checkpoints, left = run(tmp_path, [math.nan, 0.4, None, math.inf, 0.5, -math.inf], save_top_k=1)
    assert left == ["step-2", "step-6"]
    assert links(checkpoints) == {"latest": "step-6", "final": "step-6", "best": "step-2"}


def test_of_equal_ones_the_later_is_the_best(tmp_path):
    checkpoints, left = run(tmp_path, [3, 1, 1, 2], save_top_k=1)
    assert links(checkpoints)["best"] == "step-3" and left == ["step-3", "step-4"]


def test_no_link_leads_nowhere(tmp_path):
    """Where nothing but the last is kept, and where a run that had ended is made longer."""
    checkpoints, left = run(tmp_path, [1, 2, 3], save_top_k=0)
    assert links(checkpoints) == {"latest": "step-3", "final": "step-3", "best": "step-3"} and left == ["step-3"]
    describe(checkpoints.path(4), 4)
    checkpoints.arrange(4, ended=False)
    assert links(checkpoints) == {"latest": "step-4"}


def config(steps: int = 10, schedule: str | None = None, **optim) -> dict:
    sched = {} if schedule is None else {"sched": SCHEDULES[schedule]}
    return {"trainer": {"sft": {"max_steps": steps}}, "model": {"optim": {"lr": 1e-3} | sched | optim}}


def test_a_folder_is_claimed_before_all_else(tmp_path):
    """Whatever moment a run is killed at, it can go on in its folder, and no other run can."""
    run_file = tmp_path / "run/checkpoints/run.yaml"
    begun = [run_file.parent.mkdir, lambda parents: run_file.with_name("run.yaml.unfinished").write_text("mod")]
    for moment in begun:
        moment(parents=True)
        assert check_run_folder(str(tmp_path / "run"), config()) == tmp_path / "run"
    claim_run_folder(tmp_path / "run", config())
    assert [p.name for p in run_file.parent.iterdir()] == ["run.yaml"]
    (tmp_path / "run/cmd-args.log").touch()
    assert check_run_folder(str(tmp_path / "run"), config()) == tmp_path / "run"
    with pytest.raises(ValueError, match="holds another run or other files"):
        check_run_folder(str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"model.optim.lr=0.001, this one has model.optim.lr=0.5"):
        check_run_folder(str(tmp_path / "run"), config(lr=0.5))
    for damage in (lambda: run_file.write_text("]"), run_file.unlink):
        damage()
        with pytest.raises(ValueError, match="holds files, but no run of ours"):
            check_run_folder(str(tmp_path / "run"), config())


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, True),
        ({"schedule": "constant"}, True),
        ({"schedule": "cosine"}, False),
        ({"sched": {"name": "linear"}}, False),
        ({"sched": {"name": "linear", "decay_steps": 5}}, True),
    ],
)
def test_a_run_may_be_made_longer_where_its_learning_rate_does_not_ask_how_long(tmp_path, changes, free):
    claim_run_folder(tmp_path, config(10, **changes))
    if free:
        assert check_run_folder(str(tmp_path), config(20, **changes)) == tmp_path
    else:
        with pytest.raises(ValueError, match=r"max_steps=10, this one has .*max_steps=20.*decay_steps"):
            check_run_folder(str(tmp_path), config(20, **changes))
