"""Bad input ends in one line and exit code 2, a bug in a traceback, under NeMo's hydra_runner, too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from megatron_ext.errors import UserError
from megatron_ext.models.config import GPTModelConfig
from recipes.cli.errors import is_user_error, one_line, user_errors
from recipes.data.jsonl import read_jsonl
from recipes.data.sampler import EpochSampler

ROOT = Path(__file__).resolve().parents[4]


def caught(function, *arguments, **options) -> Exception:
    with pytest.raises(Exception) as info:
        function(*arguments, **options)
    return info.value


# What is whose


def test_our_own_raise_is_for_the_user(tmp_path):
    errors = [
        caught(EpochSampler, 0, 1, 1, 0, 1),
        caught(read_jsonl, tmp_path),
        caught(GPTModelConfig, num_layers=2, hidden_size=64, num_attention_heads=5, ffn_hidden_size=8),
        UserError("never raised"),
    ]
    assert all(map(is_user_error, errors)), errors


def speak(source: str) -> Exception:
    """The error of a piece of code that is a module of ours."""
    return caught(exec, compile(source, "ours.py", "exec"), {"__name__": "recipes.ours"})


@pytest.mark.parametrize(
    "source",
    [
        "from megatron_ext.errors import UserError\nraise UserError('x')",
        "from megatron_ext.errors import DivergedError\nraise DivergedError('x')",
        "from recipes.cli.config import ConfigError as E\ntry:\n    int('x')\nexcept ValueError as e:\n    raise E('y') from e",
        "open('nowhere/at/all')",
        "from pathlib import Path\nPath('nowhere/at/all').read_text()",
    ],
)
def test_recognised_as_the_users(source):
    assert is_user_error(speak(source))


@pytest.mark.parametrize(
    "source",
    [
        "int('x')",
        "a, b = [1]",
        "list(zip([1], [], strict=True))",
        "import json\njson.loads('{')",
        "import torch\ntorch.zeros(2).view(3, 3).bad",
        "{}['x']",
        "raise ValueError('x')",
        "raise FileExistsError('x')",
        "raise KeyError('x')",
        "raise RuntimeError('x')",
        "assert False",
        "import socket\nsocket.socket().bind(('256.0.0.1', 0))",
    ],
)
def test_recognised_as_a_bug(source):
    assert not is_user_error(speak(source))


def test_decorator_and_context_manager(capsys):
    @user_errors()
    def refuses():
        read_jsonl("nowhere\nat all.jsonl")

    for function in (refuses, lambda: user_errors()(read_jsonl)("nowhere\nat all.jsonl")):
        error = caught_exit(function)
        assert error.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("error: cannot read nowhere at all.jsonl")

    with pytest.raises(ZeroDivisionError), user_errors():
        1 / 0  # noqa: B018
    with pytest.raises(KeyboardInterrupt), user_errors():
        raise KeyboardInterrupt
    assert user_errors()(lambda: 3)() == 3


def caught_exit(function) -> SystemExit:
    with pytest.raises(SystemExit) as info:
        function()
    return info.value


def test_lines_of_files_and_configurations(tmp_path):
    assert one_line(caught(open, tmp_path / "x")) == f"{tmp_path / 'x'}: No such file or directory"
    node = OmegaConf.create({"data": {"path": "???", "other": "${nope}"}})
    error = caught(lambda: node.data.path)
    assert "data.path is not set" in one_line(error) and is_user_error(error)
    error = caught(lambda: node.data.other)
    assert one_line(error) == "data.other: Interpolation key 'nope' not found" and is_user_error(error)
    (tmp_path / "bad.yaml").write_text("a: 1\nb: [1\nc: 2\n")
    with open(tmp_path / "bad.yaml") as file:
        error = caught(yaml.safe_load, file)
    assert one_line(error).startswith(f"{tmp_path / 'bad.yaml'}:3: ") and is_user_error(error)
    assert one_line(ValueError()) == "ValueError"


def test_a_key_that_the_code_misspells_is_a_bug():
    node = OmegaConf.create({"a": 1})
    OmegaConf.set_struct(node, True)
    assert not is_user_error(caught(lambda: node.b))


# Under NeMo's hydra_runner, in real processes

COMMANDS = {
    "ran": f"path={__file__}",
    "refuses": "path=x lr=2",
    "cannot_open": "path=nowhere.txt",
    "bug": "path=x lr=-1",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """name -> (exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "conf").mkdir()
    (folder / "conf/start.yaml").write_text("path: ???\nlr: 1e-4\n")
    shutil.copy(ROOT / "tests/programs/hydra_script.py", folder)  # Hydra looks for conf/ beside the script
    command = [sys.executable, "-W", "ignore", "-m", "tests.programs.fork_script", "hydra_script.py"]
    done = subprocess.run(
        command + [f"{name} {asked}" for name, asked in COMMANDS.items()],
        cwd=folder, env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(folder)}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = {name: [(folder / f"{name}.{n}").read_text() for n in ("code", "out", "err")] for name in COMMANDS}
    return {name: (int(code), out, err) for name, (code, out, err) in read.items()}


@pytest.mark.parametrize(
    ("name", "words"), [("refuses", "lr is too large"), ("cannot_open", "nowhere.txt: No such file or directory")]
)
def test_a_task_refuses_in_one_line_under_hydra_runner(finished, name, words):
    code, _, err = finished[name]
    assert (code, err) == (2, f"error: {words}\n")


def test_a_good_run_says_nothing_on_stderr(finished):
    assert finished["ran"] == (0, "lr 0.0001\n", "")


def test_a_bug_keeps_its_traceback(finished):
    code, _, err = finished["bug"]
    assert code == 1
    assert 'int("x")' in err and "ValueError" in err and "error: " not in err
