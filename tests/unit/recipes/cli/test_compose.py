"""Command lines: what they compose, what they show, and what is refused in one line that names the nearest key."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml

from recipes.cli.compose import SECTIONS, choices, command_line, compose, forced
from recipes.cli.errors import is_user_error, one_line
from recipes.registry import RECIPES

ROOT = Path(__file__).resolve().parents[4]
CONFIGURATIONS = {
    "start": "defaults:\n  - model: tiny\n  - _self_\ndata:\n  path: ???\n  seed: ${model.hidden_size}\n",
    "model/tiny": "hidden_size: 32\nlr: 1e-4\n",
    "model/small": "hidden_size: 64\nlr: 1e-5\n",
    "broken": "a: 1\nb: [1, 2\nc: 3\n",
    "dangling": "defaults:\n  - model: tiny\n  - _self_\ndata: {path: x, seed: '${nope.here}'}\n",
    "grouped": "defaults:\n  - model: tinny\n  - _self_\ndata: {path: x}\n",
    "computed": "four: '${multiply:2,2}'\nfive: '${sum:${four},1}'\nday: '${now:%Y-%m-%d}'\nname: '${hydra:job.name}'\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("conf"), CONFIGURATIONS)


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


# name -> (arguments, words of the one line)
REFUSED = {
    "unknown key": (["model.hiden_size=3"], ["unknown key model.hiden_size; did you mean model.hidden_size?"]),
    "two unknown keys": (["model.hiden_size=3", "data.sed=1"], ["did you mean model.hidden_size?"]),
    "unknown section": (["modle.hidden_size=3"], ["did you mean model.hidden_size?"]),
    "unknown, nothing near": (["data.zzz=3"], ["unknown key data.zzz", "+data.zzz=3"]),
    "unknown key within": (
        ["model={hiden_size: 3}"],
        ["model={hiden_size: 3} has a key that the YAML does not list", "++model"],
    ),
    "delete unknown": (["~data.zzz"], ["data.zzz"]),
    "value not set": ([], ["data.path is not set", "data.path=..."]),
    "bad override": (["data.path=a=b"], ["data.path=a=b", "quotes"]),
    "not an override": (["two words"], ["two words"]),
    "ambiguous": (["data.path=a,b"], ["data.path=a,b", "list"]),
    "unknown option": (["--model.lr=3"], ["--model.lr=3", "without dashes"]),
    "sweep": (["-m", "model.lr=1,2"], ["--multirun"]),
    "sweep by key": (["hydra.mode=MULTIRUN", "data.path=x"], ["--multirun"]),
    "rerun": (["--experimental-rerun=x"], ["--experimental-rerun is not supported"]),
    "two commands": (["--cfg=job", "--info"], ["--cfg and --info: give one of them"]),
    "resolve alone": (["--resolve", "data.path=x"], ["--resolve is for --cfg and --help"]),
    "no such view": (["--cfg=jobs"], ["jobs", "--help lists the options"]),
    "no such configuration": (["--config-name=stat"], ["stat", "did you mean start?"]),
    "no such folder": (["--config-path=/nowhere"], ["/nowhere"]),
    "no such other folder": (["--config-dir=/nowhere"], ["/nowhere"]),
    "no such group member": (["model=tinny"], ["model/tinny", "did you mean tiny?"]),
    "no such group member in a file": (["--config-name=grouped"], ["model/tinny"]),
    "broken YAML": (["--config-name=broken"], ["broken.yaml:3:"]),
    "dangling": (["--config-name=dangling"], ["data.seed", "nope.here"]),
    "help of an unknown key": (["--help", "model.hiden_size=3"], ["did you mean model.hidden_size?"]),
    "shown with an unknown key": (["--cfg=job", "model.hiden_size=3"], ["did you mean model.hidden_size?"]),
    "looked into with an unknown key": (["--info=config", "model.hiden_size=3"], ["did you mean model.hidden_size?"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(folder, name, capfd):
    arguments, words = REFUSED[name]
    with pytest.raises(Exception) as caught:
        command_line(arguments, "start", folder)
    line = one_line(caught.value)
    assert is_user_error(caught.value) and "\n" not in line
    assert all(word in line for word in words), line
    assert capfd.readouterr() == ("", "")


def test_a_configuration_is_resolved_plain_data(folder):
    size = random.randrange(1000)
    given = ["data.path=x", "model.lr=1e-3", "+model.extra=[1]", f"model.hidden_size={size}"]
    expected = {"model": {"hidden_size": size, "lr": 1e-3, "extra": [1]}, "data": {"path": "x", "seed": size}}
    assert command_line(given, "start", folder) == expected == compose("start", given, folder)
    # Options may stand anywhere, and a file be named with its ending.
    assert command_line([*given[:2], "--config-name", "start.yaml", *given[2:]], "broken", folder) == expected
    assert compose("start", given[1:], folder, may_be_unset=True)["data"]["path"] == "???"
    assert choices("start", ["model=small"], folder)["model"] == "small"


def test_what_yaml_may_compute(folder):
    found = command_line([], "computed", folder, "train_mine")
    assert found == {"four": 4, "five": 5, "day": f"{date.today():%Y-%m-%d}", "name": "train_mine"}


def test_a_folder_of_ones_own_goes_instead_or_behind(folder, tmp_path, monkeypatch):
    written(
        tmp_path, {"mine": "defaults:\n  - model: small\n  - _self_\ndata: {path: mine}\n", "start": "other: true\n"}
    )
    found = command_line(["--config-dir", str(tmp_path), "--config-name", "mine"], "start", folder)
    assert found == {"model": {"hidden_size": 64, "lr": 1e-5}, "data": {"path": "mine"}}
    assert "other" not in command_line(["-cd", str(tmp_path), "data.path=x"], "start", folder)
    assert command_line(["-cp", str(tmp_path)], "start", folder) == {"other": True}
    monkeypatch.chdir(tmp_path.parent)
    assert command_line(["-cp", tmp_path.name, "-cn", "start"], "mine", folder) == {"other": True}


@pytest.fixture
def logging_as_before(monkeypatch):
    """Hydra sets up logging to say some of it, and closes all handlers that there are; absl's would close pytest's own files."""
    level = logging.root.level
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging, "_handlerList", [])
    yield
    logging.root.setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["hidden_size: 32", "train_mine", "model: small, tiny"]),
        (["--hydra-help"], ["--hydra-help"]),
        (["--cfg", "job"], ["hidden_size: 32", "seed: ${model.hidden_size}"]),
        (["--cfg", "job", "--resolve", "data.path=x"], ["seed: 32"]),
        (["--cfg", "job", "--package", "model"], ["# @package model\nhidden_size: 32"]),
        (["--cfg", "hydra"], ["name: train_mine"]),
        (["--info", "defaults"], ["model/tiny"]),
        (["--info", "searchpath"], ["file://"]),
        (["--version"], ["Hydra 1."]),
    ],
    ids=" ".join,
)
def test_asking_for_something_else_does_not_run(folder, arguments, words, capsys, logging_as_before):
    with pytest.raises(SystemExit) as ended:
        command_line(arguments, "start", folder, "train_mine")
    said = capsys.readouterr()
    assert not ended.value.code and said.err == ""
    assert all(word in said.out for word in words), said.out
    if arguments == ["--cfg", "job"]:
        assert yaml.safe_load(said.out)["model"] == {"hidden_size": 32, "lr": 1e-4}


def test_keys_of_every_section_may_be_set(folder):
    """A key that the YAML leaves at its default needs no plus, in whatever section a recipe has."""
    sections = {field for recipe in RECIPES.values() for field in recipe.config_class().__dataclass_fields__}
    assert {section.rstrip(".") for section in SECTIONS} == sections
    assert forced(["model.new=1", "modle.new=1", "--model.new=1", "model=small"]) == [
        "++model.new=1", "modle.new=1", "--model.new=1", "model=small",
    ]  # fmt: skip
    assert command_line(forced(["data.path=x", "model.new=1"]), "start", folder)["model"]["new"] == 1


def test_a_command_line_needs_neither_torch_nor_nemo():
    modules = "recipes.cli.launch, recipes.cli.compose, recipes.data.rows, recipes.rewards.registry"
    source = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"nemo", "torch", "transformers", "megatron"} & set(done.stdout.split())
