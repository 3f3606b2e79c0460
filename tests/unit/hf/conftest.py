"""Small models as transformers saves them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.hf_models import make_hf_model


@pytest.fixture(scope="module")
def originals(module_rng, tmp_path_factory):
    """Folders of several files each, by case."""
    root = tmp_path_factory.mktemp("originals")
    folders = {name: root / name.replace(" ", "-") for name in ("llama 3", "qwen2 with windows", "qwen3")}
    for name, folder in folders.items():
        make_hf_model(folder, name, module_rng)
        assert len(list(folder.glob("*.safetensors"))) > 2
        (folder / "LICENSE.txt").write_text("free")
    return folders


@pytest.fixture
def folder(originals, tmp_path) -> Path:
    """A copy of a Llama 3 folder to spoil."""
    return shutil.copytree(originals["llama 3"], tmp_path / "model")
