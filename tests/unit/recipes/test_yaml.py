"""YAML files hold differences: a line that repeats what holds without it is there to be seen, and its comment says why."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from recipes.cli.compose import CONFIG_FOLDER, compose
from recipes.registry import RECIPES

FILES = sorted(path.relative_to(CONFIG_FOLDER).as_posix() for path in CONFIG_FOLDER.rglob("*.yaml"))
# What describes a published model or a cluster says all of it.
WHOLE = re.compile(r"(cluster|family|layout|tower)/|model/(deepseek|glm|gpt_oss|llama|qwen|vicuna)")
UNSET = object()


def leaves(node: yaml.Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, int]]:
    """(dotted key, value, line) of every value of a YAML file."""
    if not isinstance(node, yaml.MappingNode):
        yield path, yaml.safe_load(yaml.serialize(node)), node.start_mark.line
        return
    for key, value in node.value:
        yield from leaves(value, (*path, key.value))


def default(cls: type, path: tuple[str, ...]) -> Any:
    """What a configuration's class says where the YAML says nothing."""
    field = next((f for f in dataclasses.fields(cls) if f.name == path[0]), None)
    if field is None:
        return UNSET
    if len(path) > 1:
        hint = get_type_hints(cls)[field.name]
        section = next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)
        return default(section, path[1:]) if section else UNSET
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return UNSET if field.default is dataclasses.MISSING else field.default


def same(one: Any, other: Any) -> bool:
    """YAML reads 1e-5 as text and a pair as a list."""
    if isinstance(other, tuple):
        other = list(other)
    if isinstance(other, float) and isinstance(one, (str, int)):
        one = float(one)
    return type(one) is type(other) and one == other


def parents(file: str, folder: Path) -> dict:
    """What a recipe's YAML is composed of, without what it says itself."""
    raw = yaml.safe_load((CONFIG_FOLDER / file).read_text(encoding="utf-8"))
    shutil.copytree(CONFIG_FOLDER, folder)
    (folder / "parents.yaml").write_text(yaml.safe_dump({"defaults": raw.get("defaults", ["_self_"])}))
    return compose("parents", folder=folder, may_be_unset=True)


@pytest.mark.parametrize("file", [file for file in FILES if not WHOLE.match(file)])
def test_what_repeats_what_holds_anyway_has_a_comment(file, tmp_path):
    text = (CONFIG_FOLDER / file).read_text(encoding="utf-8")
    lines = text.splitlines()
    package = re.match(r"# @package (\w+)", text)
    prefix = (package[1],) if package and package[1] != "_global_" else ()
    above = parents(file, tmp_path / "conf") if "/" not in file else {}
    named = re.findall(r"python recipes/(\w+)\.py", text)
    classes = [RECIPES[name].config_class() for name in named[:1] or ("train_sft", "train_grpo", "train_lftf")]
    for path, value, line in leaves(yaml.compose(text)):
        path = (*prefix, *path)
        if path[0] == "defaults":
            continue
        inherited: Any = above
        for name in path:
            inherited = inherited.get(name, UNSET) if isinstance(inherited, dict) else UNSET
        held = [inherited] if inherited is not UNSET else [default(cls, path) for cls in classes]
        if any(same(value, other) for other in held):
            assert "#" in lines[line], f"{file}:{line + 1}: {'.'.join(path)}={value} holds without this line"


def test_a_line_that_repeats_is_found(tmp_path):
    """Guards the test above."""
    sft = RECIPES["train_sft"].config_class()
    for key, value in (
        ("layernorm_epsilon", "1e-5"),
        ("optim.betas", [0.9, 0.95]),
        ("seed", 1),
        ("optim.weight_decay", 0),
    ):
        assert same(value, default(sft, ("model", *key.split("."))))
    assert same(1, default(sft, ("data", "video", "frames_per_patch")))
    assert not same(True, default(sft, ("model", "seed"))) and not same(0, default(sft, ("model", "loss_on_prompt")))
    assert (
        default(sft, ("model", "num_layers")) is default(sft, ("model", "nothing")) is default(sft, ("a", "b")) is UNSET
    )
    found = {".".join(path): line for path, _, line in leaves(yaml.compose("a:\n  b: 1\n  c: {d: [2]}\n"))}
    assert found == {"a.b": 1, "a.c.d": 2}
    assert parents("grpo_video_tiny.yaml", tmp_path / "conf")["trainer"]["grpo"]["samples_per_prompt"] == 16
