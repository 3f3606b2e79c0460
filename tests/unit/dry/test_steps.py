"""Steps, and every recipe from its YAML to its end, as a GPU would run them: nothing but the listed reads makes the host wait."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import megatron_ext.losses
from megatron_ext.kinds import Kind, kinds
from megatron_ext.losses import OBJECTIVES
from megatron_ext.models import GPTModelConfig
from megatron_ext.vision.kinds import TOWERS
from megatron_ext.vision.settings import CONNECTORS
from recipes.registry import RECIPES
from tests.dry.recipes import CASES, recipes
from tests.dry.run import NECESSARY
from tests.dry.steps import STEPS, steps
from tests.harness import run_ranks


@pytest.fixture(scope="module")
def taken() -> dict[str, dict]:
    (found,) = run_ranks(steps, 1, list(STEPS))
    return dict(zip(STEPS, found, strict=True))


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict[str, dict]:
    (found,) = run_ranks(recipes, 1, tmp_path_factory.mktemp("dry"), list(CASES))
    return found


@pytest.mark.parametrize("name", STEPS)
def test_the_host_reads_what_it_must_and_no_more(name, taken):
    assert taken[name]["reads"] == STEPS[name].reads


def test_every_recipe_has_a_dry_run():
    assert set(CASES) == set(RECIPES)


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_reads_what_it_must_and_no_more(name, ran):
    assert ran[name]["reads"] == CASES[name].reads
    assert f"recipes/{name}.py:main" in ran[name]["places"]


def test_every_objective_has_a_dry_run(taken, ran):
    """Every public function of tensors in megatron_ext.losses has been run on the device, by a step or a recipe."""
    reached = set().union(*(run["places"] for run in (*taken.values(), *ran.values())))
    for module in pkgutil.iter_modules(megatron_ext.losses.__path__):
        found = importlib.import_module(f"megatron_ext.losses.{module.name}")
        for name in found.__all__:
            function = getattr(found, name)
            if inspect.isfunction(function) and "Tensor" in map(str, inspect.get_annotations(function).values()):
                assert f"megatron_ext/losses/{module.name}.py:{name}" in reached, f"{name} has no dry run"


def test_every_name_of_the_registry_has_a_dry_run(taken):
    for make in OBJECTIVES.values():
        method = make.policy_loss
        assert f"{method.__module__.replace('.', '/')}.py:{method.__qualname__}" in taken["objectives"]["places"]


# Keys of a model that no step has otherwise than as they come.
WITHOUT = {
    **dict.fromkeys(("transformer_impl", "fp8", "fp8_recipe", "moe_grouped_gemm"), "Transformer Engine's"),
    "gradient_accumulation_fusion": "apex's",
    **dict.fromkeys(
        (
            "attention_dropout", "hidden_dropout", "moe_expert_capacity_factor", "moe_token_dropping", "peft.dropout",
            "peft.name",
        ),
        "has one value",
    ),
    **{
        f"position_embedding.scaling.{x}": "of a table that the host makes"
        for x in ("beta_slow", "high_freq_factor", "low_freq_factor", "truncate")
    },
    "precision": "auto is bf16 there",
    **dict.fromkeys(
        ("vision.preprocessing", "vision.video_preprocessing", "vision.image_token_id", "vision.video_token_id"),
        "of rows, which the host prepares",
    ),
    **dict.fromkeys(
        ("vision.cache_gib", "vision.cache_folder", "vision.cache_folder_gib", "peft.restore_from_path"),
        "the host's memory and files",
    ),
}  # fmt: skip
TRIED = (Kind.ARCHITECTURE, Kind.TRAINING, Kind.LAYOUT, Kind.SPEED)


def otherwise(key: str) -> bool:
    """Whether a step's model has this key otherwise than as it comes, or it comes as nothing."""
    section, _, name = key.rpartition(".")
    for step in STEPS.values():
        holder = functools.reduce(
            lambda x, part: getattr(x, part, None), section.split(".") if section else (), step.config
        )
        if holder is not None:
            (field,) = (f for f in dataclasses.fields(holder) if f.name == name)
            usual = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if getattr(holder, name) != usual:
                return True
    return False


def test_every_option_of_a_model_has_a_dry_run():
    """Layers with experts, latent attention, a tower that feeds layers, and whatever key comes next."""
    keys = {key for key, kind in kinds(GPTModelConfig).items() if kind in TRIED}
    assert {key for key in keys if not otherwise(key)} == set(WITHOUT)


def test_every_tower_and_connector_has_a_dry_run():
    eyes = [step.config.vision for step in STEPS.values() if step.config.vision is not None]
    assert {vision.tower_config["model_type"] for vision in eyes if vision.has_tower} == set(TOWERS)
    assert {vision.connector for vision in eyes} == set(CONNECTORS)
    assert any(vision.deepstack for vision in eyes)


def test_every_listed_read_happens(taken, ran):
    """The list says what is, not what was."""
    happened = set().union(*(run["reads"] for run in (*taken.values(), *ran.values())))
    assert happened == set(NECESSARY)


# Where it is the machine that is asked, and not which way a tensor's work goes.
MACHINE = {"runtime/cpu.py", "runtime/distributed.py", "attention/flex.py", "devices.py"}


def test_what_depends_on_the_device_asks_in_one_place():
    """`devices.device_type`: what looks at a tensor's device itself takes another way on "meta" than on a GPU."""
    asks = re.compile(r"\.is_cuda\b|device\.type [!=]= \"cuda\"")
    package = Path(megatron_ext.losses.__file__).parents[1]
    found = {
        p.relative_to(package).as_posix() for p in package.rglob("*.py") if asks.search(p.read_text(encoding="utf-8"))
    }
    assert found <= MACHINE
