"""Bad input ends in one line and exit code 2, a bug in a traceback; command lines are read by NeMo's hydra_runner."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from megatron_ext.errors import UserError
from megatron_ext.models.config import GPTModelConfig
from recipes.cli.errors import is_user_error, one_line, user_errors
from recipes.data.rows import read_jsonl
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


# Command lines, through NeMo's hydra_runner, in real processes

RUNNER = """
from nemo.core.config import hydra_runner
from recipes.cli.compose import run
from megatron_ext.errors import UserError
from recipes.cli.errors import user_errors

@hydra_runner(config_path="conf", config_name="start")
@user_errors()
def main(cfg):
    print("lr", cfg.model.lr)
    if cfg.model.lr > 1:
        raise UserError("model.lr is\\ntoo large")
    if cfg.model.lr < 0:
        int("x")
    open(cfg.data.path)

if __name__ == "__main__":
    run(main)
"""
COMPOSER = """
import json
from recipes.cli.compose import compose

if __name__ == "__main__":
    print(json.dumps(compose("conf", "start")))
"""
CONFIGURATIONS = {
    "start": "defaults:\n  - model: tiny\n  - _self_\ndata:\n  path: ???\n  seed: ${model.hidden_size}\n",
    "model/tiny": "hidden_size: 32\nlr: 1e-4\n",
    "broken": "a: 1\nb: [1, 2\nc: 3\n",
    "dangling": "defaults:\n  - model: tiny\n  - _self_\ndata: {path: x, seed: '${nope.here}'}\n",
    "grouped": "defaults:\n  - model: tinny\n  - _self_\ndata: {path: x}\n",
}
# One process imports NeMo (it takes seconds) and is copied for each command line, some at a time.
DRIVER = """
import json, os, runpy, sys, traceback
import nemo.core.config
import nemo.lightning.callback_group  # hydra_runner imports it at the end of every run

running = {}

def wait():
    child, status = os.wait()
    with open(f"{running.pop(child)}.code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(status)))

for number, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv, code = arguments, 0
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking NeMo's modules down would take seconds
    running[child] = number
    if len(running) == 4:
        wait()
while running:
    wait()
"""


@dataclass
class Finished:
    code: int
    out: str
    err: str


# name -> (arguments, words of the one line)
REFUSED = {
    "unknown key": (["model.hiden_size=3"], ["unknown key model.hiden_size; did you mean model.hidden_size?"]),
    "two unknown keys": (["model.hiden_size=3", "data.sed=1"], ["did you mean model.hidden_size?"]),
    "unknown section": (["modle.hidden_size=3"], ["did you mean model.hidden_size?"]),
    "unknown, nothing near": (["data.zzz=3"], ["unknown key data.zzz", "+data.zzz=3"]),
    "delete unknown": (["~data.zzz"], ["data.zzz"]),
    "value not set": ([], ["data.path is not set", "data.path=..."]),
    "bad override": (["data.path=a=b"], ["data.path=a=b", "quotes"]),
    "not an override": (["two words"], ["two words"]),
    "ambiguous": (["data.path=a,b"], ["data.path=a,b", "list"]),
    "unknown option": (["--model.lr=3"], ["--model.lr=3", "without dashes"]),
    "sweep": (["-m", "model.lr=1,2"], ["--multirun"]),
    "no such configuration": (["--config-name=stat"], ["stat", "did you mean start?"]),
    "no such folder": (["--config-path=/nowhere"], ["/nowhere"]),
    "no such group member": (["model=tinny"], ["model/tinny", "did you mean tiny?"]),
    "no such group member in a file": (["--config-name=grouped"], ["model/tinny"]),
    "broken YAML": (["--config-name=broken"], ["broken.yaml:3:"]),
}
# Only the script decides these.
RUNNER_CASES = {
    "task refuses": (["data.path=x", "model.lr=2"], ["model.lr is too large"]),
    "task cannot open": (["data.path=nowhere.txt"], ["nowhere.txt", "No such file"]),
}
COMPOSER_CASES = {"dangling": (["--config-name=dangling"], ["data.seed", "nope.here"])}
ENDING_WELL = {
    "composed": ["composer.py", "data.path=x", "model.lr=1e-3", "+model.extra=[1]"],
    "help": ["composer.py", "--help"],
    "shown": ["composer.py", "--cfg", "job"],
    "ran": ["runner.py", f"data.path={__file__}"],
}
COMMANDS = {
    **{("runner.py", name): ["runner.py", *a] for name, (a, _) in (REFUSED | RUNNER_CASES).items()},
    **{("composer.py", name): ["composer.py", *a] for name, (a, _) in (REFUSED | COMPOSER_CASES).items()},
    **ENDING_WELL,
    "bug": ["runner.py", "data.path=x", "model.lr=-1"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("scripts")
    for name, source in (("runner", RUNNER), ("composer", COMPOSER), ("driver", DRIVER)):
        (folder / f"{name}.py").write_text(source)
    for name, content in CONFIGURATIONS.items():
        path = folder / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "driver.py", json.dumps(list(COMMANDS.values()))],
        cwd=folder, env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(folder)}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = {n: [(folder / f"{i}.{n}").read_text() for i in range(len(COMMANDS))] for n in ("code", "out", "err")}
    assert not (folder / "multirun").exists() and not (folder / "outputs").exists()
    return {
        name: Finished(int(code), out, err)
        for name, code, out, err in zip(COMMANDS, read["code"], read["out"], read["err"], strict=True)
    }


@pytest.mark.parametrize("command", [c for c in COMMANDS if isinstance(c, tuple)], ids=" ".join)
def test_refused_in_one_line(finished, command):
    done = finished[command]
    assert done.code == 2, done
    (line,) = done.err.splitlines()
    assert line.startswith("error: "), line
    for word in (REFUSED | RUNNER_CASES | COMPOSER_CASES)[command[1]][1]:
        assert word in line, line


def test_composed_configuration_is_resolved_plain_data(finished):
    done = finished["composed"]
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == {
        "model": {"hidden_size": 32, "lr": 1e-3, "extra": [1]},
        "data": {"path": "x", "seed": 32},
    }


def test_asking_for_something_else_does_not_run(finished):
    for name in ("help", "shown"):
        done = finished[name]
        assert (done.code, done.err) == (0, ""), done
        assert "hidden_size: 32" in done.out


def test_a_good_run_says_nothing_on_stderr(finished):
    assert (finished["ran"].code, finished["ran"].err) == (0, "")
    assert finished["ran"].out == "lr 0.0001\n"


def test_a_bug_keeps_its_traceback(finished):
    done = finished["bug"]
    assert done.code == 1
    assert "Traceback" in done.err and 'int("x")' in done.err and "error: " not in done.err


def test_importing_our_modules_does_not_import_nemo():
    source = "import sys, recipes.cli.compose, recipes.data.rows, recipes.grpo.rewards; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"nemo", "torch", "transformers", "megatron"} & set(done.stdout.split())
