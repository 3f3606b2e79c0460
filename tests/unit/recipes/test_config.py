"""Strict configuration: every mistake is one line that names the key; defaults come from the dataclasses."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recipes.config import ConfigError, build
from recipes.settings import GRPOConfig, SFTConfig
from tests.recipe_runs import ROOT


@dataclass
class Inner:
    rate: float
    sizes: tuple[int, int] = (1, 2)
    flag: bool = False


@dataclass
class Outer:
    name: str
    inner: Inner
    count: int | None = None
    anything: Any = None
    extra: dict = field(default_factory=dict)


GOOD = {"name": "x", "inner": {"rate": 0.5}}


def test_defaults_and_conversions():
    built = build(Outer, {"name": 32, "inner": {"rate": "1e-4", "sizes": [3, 4]}, "anything": [1, {"a": 2}]})
    assert built == Outer("32", Inner(1e-4, (3, 4), False), None, [1, {"a": 2}], {})
    assert build(Outer, {**GOOD, "inner": {"rate": 2}}).inner.rate == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "y"}, "unknown key nmae; did you mean name?"),
        ({"inner": {"rate": 1.0, "flga": True}}, "unknown key inner.flga; did you mean inner.flag?"),
        ({"inner": {}}, "inner.rate is not set"),
        ({"inner": {"rate": "fast"}}, "inner.rate='fast' has the wrong type: expected float"),
        ({"inner": {"rate": 1.0, "flag": 1}}, "inner.flag=1 has the wrong type: expected bool"),
        ({"count": True}, "count=True has the wrong type: expected int"),
        ({"count": 1.5}, "count=1.5 has the wrong type: expected int"),
        ({"inner": 3}, "inner must be a section of keys, got 3"),
        ({"inner": {"rate": 1.0, "sizes": 3}}, "inner.sizes=3 has the wrong type"),
        ({"extra": []}, "extra=[] has the wrong type: expected dict"),
    ],
)
def test_mistakes_name_the_key(change, message):
    with pytest.raises(ConfigError) as caught:
        build(Outer, {**GOOD, **change})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "cls"), [("sft_tiny", SFTConfig), ("grpo_tiny", GRPOConfig)])
def test_every_yaml_fills_its_dataclass(name, cls):
    given = ["data.train_path=x", "model.tokenizer=y", "pretrained_checkpoint.restore_from_path=z"]
    with initialize_config_dir(str(ROOT / "nemo_configs"), version_base=None):
        node = OmegaConf.to_container(compose(name, given), resolve=True, throw_on_missing=True)
    config = build(cls, node)
    assert config.data.train_path == "x" and config.model.tokenizer == "y"
    assert config.model.optim.lr == node["model"]["optim"]["lr"] > 0


def test_the_reference_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "tools/config_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
