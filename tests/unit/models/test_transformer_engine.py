"""The Transformer Engine model, which needs a GPU to run: built, run and saved with modules that take what the real ones take.

Its signatures are those of tests/fixtures/transformer_engine.json, which tools/te_signatures.py reads from the wheels of every
supported version; megatron-core's wrappers are the installed one's.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest

from megatron_ext.models.fp8 import FP8_ROWS
from megatron_ext.runtime.install_check import TRANSFORMER_ENGINE
from tests.recipe_runs import run
from tools.te_signatures import FIXTURE, collect, read_sources

SIGNATURES = json.loads(FIXTURE.read_text(encoding="utf-8"))
# fp32 sums of up to 48 terms in another order.
ROUNDING = 1e-5
# Gone since 2.10. megatron-core asks for it under `except ImportError`, and routes tokens to experts by torch without it.
RECIPES = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
DONE_WITHOUT = {"transformer_engine.pytorch.module.base.get_workspace"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """Of a process in which Transformer Engine's place is taken before Megatron is imported."""
    done = run("-m", "tests.programs.te_modules", tmp_path_factory.mktemp("te"), imports=True)
    assert done.code == 0, done.err[-3000:]
    return json.loads(done.out.splitlines()[-1])


@pytest.mark.parametrize("version", SIGNATURES["versions"])
def test_a_version_has_and_takes_all_that_our_model_asks_of_it(version, answers):
    found = answers["versions"][version]
    assert "refused" not in found, found["refused"]
    assert set(found["lacking"]) <= DONE_WITHOUT
    assert found["optimizer"] == "FusedAdam"


@pytest.mark.parametrize("version", SIGNATURES["versions"])
def test_its_model_is_the_local_one(version, answers):
    """Log-probabilities and every gradient with the same weights; what a checkpoint holds, also under TP and SP."""
    found = answers["versions"][version]
    assert found["logprobs"] <= ROUNDING and found["gradients"] <= ROUNDING
    assert found["names"] == found["names of a tensor-parallel rank"]
    # Norms keep something beside their weight, which is nothing without FP8; reading does without it.
    assert all(re.search(r"layernorm\._extra_state$", name) for name in found["names"])


@pytest.mark.parametrize("version", [SIGNATURES["versions"][0], SIGNATURES["versions"][-1]])
def test_checkpoints_go_both_ways(version, answers):
    assert answers["versions"][version]["checkpoints"] == []


@pytest.mark.parametrize("version", SIGNATURES["versions"])
@pytest.mark.parametrize("recipe", FP8_ROWS)
def test_fp8_is_asked_for_as_the_version_takes_it(recipe, version, answers):
    """Every layer in its context, with rows and channels of sizes that FP8 takes and no weights kept from an earlier pass; the
    played modules compute the same as without."""
    for recompute in ("none", "full"):
        found = answers["versions"][version]["fp8"][f"{recipe}, {recompute}"]
        assert found == {"same": True, "recipes": [RECIPES[recipe]], "layers": 2, "linears": 8, "kept": 0}


def test_megatron_took_its_wrappers_bases_from_the_fixture(answers):
    """Else something else was tested."""
    assert {f"transformer_engine.pytorch.{name}" for name in ("Linear", "LayerNormLinear")} <= set(answers["imported"])


def test_supported_versions_are_those_of_the_fixture():
    low, high = re.search(r">=2\.(\d+),<2\.(\d+)", TRANSFORMER_ENGINE).groups()
    minors = sorted({int(version.split(".")[1]) for version in SIGNATURES["versions"]})
    assert set(range(int(low), int(high))) <= set(minors)


SOURCES = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch/__init__.py": "try:\n    from .module import *\nexcept ImportError:\n    pass\n"
    "from .fp8 import fp8_autocast\n",
    "transformer_engine/pytorch/module/__init__.py": "from .linear import Linear\nfrom ..norms import RMSNorm as RMSNorm\n",
    "transformer_engine/pytorch/module/linear.py": "from .base import Base\n\nclass Linear(Base):\n"
    "    def __init__(self, a: int, /, b=1, *, c: str = 'x', **kwargs): ...\n    def forward(self, x, first=None): ...\n",
    "transformer_engine/pytorch/module/base.py": "class Base:\n    def __init__(self, b=2, d=None): ...\n"
    "    def get_extra_state(self): ...\n",
    "transformer_engine/common/__init__.py": "",
    "transformer_engine/common/recipe.py": "from dataclasses import dataclass\n\n@dataclass(repr=False)\nclass DelayedScaling:\n"
    "    margin: int = 0\n    wanted: str\n    shared = 3\n",
    "transformer_engine/pytorch/norms.py": "class RMSNorm:\n    def forward(self, x): ...\n",
    "transformer_engine/pytorch/fp8.py": "import contextlib\n\ndef fp8_autocast(enabled=True, *args): ...\n",
}


def test_signatures_are_read_through_imports_bases_and_stars(tmp_path: Path):
    for version, sources in (("2.9.0", SOURCES), ("2.10.0", SOURCES)):
        with zipfile.ZipFile(tmp_path / f"transformer_engine-{version}-py3-none-any.whl", "w") as archive:
            for path, text in sources.items():
                archive.writestr(path, text if version == "2.9.0" else text.replace("b=1", "b=3"))
    found = collect(read_sources(tmp_path))
    assert found["versions"] == ["2.9.0", "2.10.0"]
    names = {name: entries for name, entries in found["names"].items() if entries}
    linear = {"kind": "class", "forward": ["x", "first=None"], "extra_state": True}
    assert names == {
        "transformer_engine.pytorch.Linear": [
            {"versions": ["2.9.0"], "arguments": ["a", "b=1", "*", "c='x'", "d=None"]} | linear,
            {"versions": ["2.10.0"], "arguments": ["a", "b=3", "*", "c='x'", "d=None"]} | linear,
        ],
        "transformer_engine.pytorch.RMSNorm": [
            {
                "versions": ["2.9.0", "2.10.0"],
                "kind": "class",
                "arguments": None,
                "forward": ["x"],
                "extra_state": False,
            }
        ],
        "transformer_engine.common.recipe.DelayedScaling": [
            {
                "versions": ["2.9.0", "2.10.0"],
                "kind": "class",
                "arguments": ["margin=0", "wanted"],
                "forward": None,
                "extra_state": False,
            }
        ],
        "transformer_engine.pytorch.fp8_autocast": [
            {"versions": ["2.9.0", "2.10.0"], "kind": "other", "arguments": ["enabled=True", "*args"]}
        ],
        "transformer_engine.pytorch.fp8.fp8_autocast": [
            {"versions": ["2.9.0", "2.10.0"], "kind": "other", "arguments": ["enabled=True", "*args"]}
        ],
    }
