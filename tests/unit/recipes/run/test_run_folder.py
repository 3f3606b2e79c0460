"""Which checkpoints stay and what the links say, whose a folder is, and what may change when a run goes on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.kinds import FREE, Kind, kind_of, kinds
from megatron_ext.runtime.checkpoint_files import self_checksum
from recipes.cli.compose import compose
from recipes.cli.config import build
from recipes.registry import RECIPES
from recipes.run.checkpoints import Checkpoints
from recipes.run.run_folder import check_run_folder, check_unchanged, claim_run_folder
from recipes.run.settings import CheckpointCallbackSection
from recipes.sft.settings import SFTConfig
from tests.recipe_runs import filled

SCHEDULES = {"constant": {"name": "constant"}, "cosine": {"name": "CosineAnnealing"}}


def describe(folder: Path, step: int, more: dict | None = None, **metrics: float) -> None:
    """A checkpoint, as far as its place is concerned."""
    info = {"trainer": {"step": step, "metrics": metrics}, "files": {}} | (more or {})
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


def config(steps: int = 10, schedule: str | None = None, model: dict | None = None, **optim) -> dict:
    sched = {} if schedule is None else {"sched": SCHEDULES[schedule]}
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48}
    return {
        "trainer": {"sft": {"max_steps": steps}},
        "model": shape | {"optim": {"lr": 1e-3} | sched | optim} | (model or {}),
        "data": {"train_path": "x"},
        "exp_manager": {"explicit_log_dir": "runs/x"},
    }


def goes_on(folder: Path, now: dict, cls: type = SFTConfig) -> bool:
    return check_run_folder(str(folder), cls, now) == folder


def test_a_folder_is_claimed_before_all_else(tmp_path):
    """Whatever moment a run is killed at, it can go on in its folder, and no other run can."""
    run_file = tmp_path / "run/checkpoints/run.yaml"
    begun = [run_file.parent.mkdir, lambda parents: run_file.with_name("run.yaml.unfinished").write_text("mod")]
    for moment in begun:
        moment(parents=True)
        assert goes_on(tmp_path / "run", config())
    claim_run_folder(tmp_path / "run", config())
    assert [p.name for p in run_file.parent.iterdir()] == ["run.yaml"]
    (tmp_path / "run/cmd-args.log").touch()
    assert goes_on(tmp_path / "run", config())
    with pytest.raises(ValueError, match="holds another run or other files"):
        check_run_folder(str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"model.optim.lr=0.001, this one has model.optim.lr=0.5"):
        goes_on(tmp_path / "run", config(lr=0.5))
    for damage in (lambda: run_file.write_text("]"), run_file.unlink):
        damage()
        with pytest.raises(ValueError, match="holds files, but no run of ours"):
            goes_on(tmp_path / "run", config())


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
        assert goes_on(tmp_path, config(20, **changes))
    else:
        with pytest.raises(ValueError, match=r"max_steps=10, this one has .*max_steps=20.*decay_steps"):
            goes_on(tmp_path, config(20, **changes))


def test_a_default_that_is_written_out_is_the_same_run(tmp_path):
    """A run that an older YAML began, which said more or less of what is the default anyway, and every default is kept."""
    least = config()
    said = config(betas=[0.9, 0.95], weight_decay=0, lr="1e-3", model={"num_query_groups": 4, "precision": "auto"})
    complete = dataclasses.asdict(build(SFTConfig, least))
    for before in (least, said, complete):
        claim_run_folder(tmp_path, before)
        for now in (least, said, complete):
            assert goes_on(tmp_path, now)
        with pytest.raises(ValueError, match=r"model.optim.betas=\(0.9, 0.95\), this one has .*\(0.9, 0.99\)"):
            goes_on(tmp_path, config(betas=[0.9, 0.99]))


def test_a_run_from_before_there_were_sections_keeps_how_it_was_trained(tmp_path):
    """Its checkpoints say [12, 10, 10], which the model that it started from may now say, too."""
    position = {"scheme": "mrope_interleaved"}
    claim_run_folder(tmp_path, config(model={"kv_channels": 64, "position_embedding": position}))
    for sections, same in ((None, True), ([12, 10, 10], True), ([11, 11, 10], False)):
        now = config(model={"kv_channels": 64, "position_embedding": position | {"sections": sections}})
        if same:
            assert goes_on(tmp_path, now)
        else:
            with pytest.raises(ValueError, match=r"sections=\[12, 10, 10\], this one has .*\[11, 11, 10\]"):
                goes_on(tmp_path, now)


def test_a_run_that_this_version_cannot_read_is_refused_with_the_reason(tmp_path):
    claim_run_folder(tmp_path, config(model={"hiden_size": 3}))
    with pytest.raises(ValueError, match="holds a run that cannot be gone on with: unknown key model.hiden_size"):
        goes_on(tmp_path, config())


OTHER = {int: lambda v: v + 1, bool: lambda v: not v, str: lambda v: v + "x", float: lambda v: v + 0.5}


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.resumes])
def test_what_may_change_when_a_run_goes_on_is_what_its_kind_says(recipe):
    """Every key of every recipe that goes on, by another value of its type."""
    cls = RECIPES[recipe].config_class()
    node = filled(compose(RECIPES[recipe].default, ["++model.optim.sched={name: constant}"], may_be_unset=True))
    was = dataclasses.asdict(build(cls, node))
    found = Counter()
    for path, value in values(was):
        now = copy.deepcopy(was)
        functools.reduce(dict.__getitem__, path[:-1], now)[path[-1]] = OTHER[type(value)](value)
        key = ".".join(path)
        kind = kind_of(kinds(cls), key)
        found[kind] += 1
        if kind in (*FREE, Kind.DURATION):
            check_unchanged(cls, was, now, Path("runs/x"))
        else:
            with pytest.raises(ValueError, match=f"runs/x holds a run with {key}="):
                check_unchanged(cls, was, now, Path("runs/x"))
    own = (
        Kind if RECIPES[recipe].planned else (Kind.TRAINING, Kind.RECORD, Kind.SPEED, Kind.LAYOUT)
    )  # of its own models
    assert all(found[kind] for kind in own), found


def values(node: dict, *path: str):
    """(path, value) of every value that `OTHER` can change."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from values(value, *path, name)
        elif type(value) in OTHER:
            yield (*path, name), value


def test_what_a_run_has_read_may_be_called_otherwise(tmp_path):
    """Where its last checkpoint tells what that was; a reward's name is no file's."""
    claim_run_folder(tmp_path, config())
    moved = config() | {"data": {"train_path": "y"}}
    for step, contents in enumerate((None, {}, {"data.train_path": {"code": "f00"}}), 4):
        if contents is not None:
            describe(tmp_path / f"checkpoints/step-{step}", step, {"contents": contents})
            (tmp_path / f"checkpoints/step-{step}/optimizer").mkdir()
        with pytest.raises(UserError, match=r"data.train_path=x, this one has data.train_path=y"):
            goes_on(tmp_path, moved)
    describe(tmp_path / "checkpoints/step-9", 9, {"contents": {"data.train_path": {"rows": 1}}})
    (tmp_path / "checkpoints/step-9/optimizer").mkdir()
    assert goes_on(tmp_path, moved)
    with pytest.raises(UserError, match=r"model.optim.lr"):
        goes_on(tmp_path, moved | {"model": config(lr=0.5)["model"]})
