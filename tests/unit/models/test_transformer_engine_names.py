"""The Transformer Engine spec cannot run without a GPU; its names and call signatures are checked against the sources."""

import ast
import inspect
from importlib import util
from pathlib import Path

import pytest

from megatron_ext.models import specs

SOURCE = Path(util.find_spec("megatron.core").origin).parent / "extensions" / "transformer_engine.py"


def imported_names() -> set[str]:
    tree = ast.parse(inspect.getsource(specs))
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "megatron.core.extensions.transformer_engine"
        for alias in node.names
    }


def constructor_arguments(name: str) -> set[str]:
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            make = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name in ("__init__", "__new__"))
            return {a.arg for a in make.args.args + make.args.kwonlyargs}
    raise AssertionError(f"{name} is not in {SOURCE}")


def test_the_spec_uses_three_modules():
    assert imported_names() == {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TENorm"}


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        # What Megatron's SelfAttention, MLP and TransformerBlock pass when they build the spec.
        ("TELayerNormColumnParallelLinear", {"input_size", "output_size", "config", "init_method", "gather_output", "bias",
                                             "skip_bias_add", "is_expert", "tp_comm_buffer_name", "tp_group"}),
        ("TERowParallelLinear", {"input_size", "output_size", "config", "init_method", "bias", "input_is_parallel",
                                 "skip_bias_add", "is_expert", "tp_comm_buffer_name", "tp_group"}),
        ("TENorm", {"config", "hidden_size", "eps"}),
    ],
)  # fmt: skip
def test_constructor_takes_what_megatron_passes(name, needed):
    assert needed <= constructor_arguments(name)
