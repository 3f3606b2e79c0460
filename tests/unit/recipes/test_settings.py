"""The recipes' YAML files fill their dataclasses, and the page that lists their keys is up to date."""

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recipes.config import build
from recipes.settings import GRPOConfig, SFTConfig
from tests.recipe_runs import ROOT


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
