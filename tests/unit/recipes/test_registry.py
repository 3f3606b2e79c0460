"""The registry of recipes is true: of scripts, classes, YAML files and what job scripts are told."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from recipes.cli.compose import CONFIG_FOLDER, compose
from recipes.cli.config import build
from recipes.registry import RECIPES, main
from tests.imported import imported_modules
from tests.recipe_runs import ROOT, filled

REGISTRY = ROOT / "recipes" / "registry.py"
NAMES = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def script(name: str) -> str:
    return (ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8")


def test_it_lists_the_scripts_that_are_launched_and_no_others():
    launched = {path.stem for path in ROOT.glob("recipes/*.py") if "launch.run(" in path.read_text(encoding="utf-8")}
    assert launched == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_an_entry_is_true_of_its_script_and_class(name):
    recipe, cls = RECIPES[name], RECIPES[name].config_class()
    assert re.search(rf"\b(configure|build)\({cls.__name__}, cfg\)", script(name))
    assert recipe.default in NAMES
    trainer = compose(recipe.default, may_be_unset=True)["trainer"]
    assert (set(trainer) & {r.section for r in RECIPES.values()}) == {recipe.section} - {None}
    assert recipe.asks_reward == ("rewards_for(" in script(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_fills_the_class_of_the_recipe_that_it_names(name):
    head = (CONFIG_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("trainer:")[0]
    (named,) = set(re.findall(r"python recipes/(\w+)\.py (?!runs)", head))
    node = filled(compose(name, may_be_unset=True))
    config = build(RECIPES[named].config_class(), node)
    assert config.exp_manager.explicit_log_dir == node["exp_manager"]["explicit_log_dir"]
    if "optim" in node["model"]:
        assert config.model.optim.lr == float(node["model"]["optim"]["lr"]) > 0


def test_job_scripts_are_told_by_any_python(capsys):
    assert {m.split(".")[0] for m in imported_modules(REGISTRY)} <= set(sys.stdlib_module_names)
    command = [sys.executable, "-I", "-S", REGISTRY, "resumes", "train_sft"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "yes\n"
    for name, recipe in RECIPES.items():
        assert main(["resumes", name]) == 0
        assert capsys.readouterr() == (("no", "yes")[recipe.resumes] + "\n", "")


@pytest.mark.parametrize("arguments", [[], ["resumes"], ["resumes", "train_stf"], ["plans", "train_sft"]])
def test_job_scripts_are_told_when_there_is_no_such_recipe(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("error: ") and "train_sft, train_grpo" in line and said.out == ""
