"""Run recipes as a user runs them: a command line, real files, real processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_ext.bias.prompts import own_professions
from tests.harness import ROOT, end, forking
from tests.waiting import until

T = TypeVar("T")

SMALL = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"]
STREAMS = ("out", "err")
BIASED = ["model.num_layers=3", "model.hidden_size=64", "model.ffn_hidden_size=128"]


@dataclass
class Finished:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


class Running:
    """A script of the repository in a process of its own, forked from one that has imported what scripts import.

    Args:
        arguments: of the interpreter: a script, or -m and a module, and what follows.
        environment: variables beside this process's own.
    """

    def __init__(self, *arguments: object, **environment: object):
        self.command = list(map(str, arguments))
        self._folder = tempfile.TemporaryDirectory()
        for stream in STREAMS:
            Path(self._folder.name, stream).touch()
        env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        self._process = forking().Process(target=_script, args=(self.command, env, Path(self._folder.name)))
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exception) -> None:
        """Whatever it has started is ended, too."""
        end(self._process)
        self._folder.cleanup()

    def said(self) -> tuple[str, str]:
        """stdout and stderr as they are."""
        return tuple((Path(self._folder.name) / stream).read_text(errors="replace") for stream in STREAMS)

    def ended(self) -> bool:
        return self._process.exitcode is not None

    def until(self, happens: Callable[[], T], seconds: float = 600, pause: float = 0.02) -> T:
        """What `happens` gives once it is true, which it must be before the script ends, see `tests.waiting`."""
        return until(happens, lambda: self.said()[1][-3000:], self.ended, seconds, pause)

    def wait(self, timeout: float) -> Finished:
        """
        Args:
            timeout: seconds.

        Raises:
            TimeoutError: it still runs.
        """
        self._process.join(timeout)
        if not self.ended():
            raise TimeoutError(f"{' '.join(self.command)} took more than {timeout} s: {self.said()[1][-3000:]}")
        return Finished(self._process.exitcode, *self.said())


def run(*arguments: object, imports: bool = False, timeout: float = 900) -> Finished:
    """Run a script to its end, see `Running`.

    Args:
        imports: start a fresh interpreter instead, which imports all anew and hashes strings otherwise.
        timeout: seconds.
    """
    if imports:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
        return Finished(done.returncode, done.stdout, done.stderr)
    with Running(*arguments) as running:
        return running.wait(timeout)


def run_on(ranks: int, *arguments: object) -> list[Finished]:
    """Run a script on several ranks, with what torchrun would tell them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(Running(*arguments, RANK=rank, LOCAL_RANK=rank, **shared)) for rank in range(ranks)
        ]
        return [running.wait(900) for running in started]


def _script(arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    """What an interpreter does."""
    os.setsid()
    for number, stream in enumerate(STREAMS, start=1):
        os.dup2(os.open(folder / stream, os.O_WRONLY), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0:0] = [
        str(Path(arguments[0]).absolute().parent),
        *filter(None, environment.get("PYTHONPATH", "").split(":")),
    ]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def filled(node, key=""):
    """A configuration in which what must be given is given, two files as two."""
    if isinstance(node, dict):
        return {name: filled(value, name) for name, value in node.items()}
    return f"given {key}" if node == "???" else node


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@dataclass
class Task:
    """A word-problem task and a model that has seen a few steps of it."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "sft" / "checkpoints" / "final"

    def sft_overrides(self, out: Path) -> list[str]:
        return [
            f"data.train_path={self.data / 'sft.jsonl'}", f"model.tokenizer={self.data / 'tokenizer'}",
            f"exp_manager.explicit_log_dir={out}", *SMALL, "trainer.sft.max_steps=3", "model.global_batch_size=8",
            "model.micro_batch_size=4",
        ]  # fmt: skip

    def sft(self, out: Path, *overrides: str) -> Finished:
        return run("recipes/train_sft.py", "--config-name", "sft_tiny", *self.sft_overrides(out), *overrides)

    def grpo_overrides(self, out: Path) -> list[str]:
        # A reward that no model hits all the time: with equal rewards a group has no gradient.
        return [
            f"data.train_path={self.data / 'train.jsonl'}", f"exp_manager.explicit_log_dir={out}",
            f"pretrained_checkpoint.restore_from_path={self.checkpoint}", *SMALL, "trainer.grpo.max_steps=3",
            "trainer.grpo.num_prompts_per_grpo_step=4", "trainer.grpo.samples_per_prompt=4", "model.global_batch_size=16",
            "model.micro_batch_size=2", "trainer.grpo.val_check_interval=0", "trainer.grpo.length_params.max_length=8",
            "trainer.grpo.reward={name:length,target:12}",
        ]  # fmt: skip

    def grpo(self, out: Path, *overrides: str, imports: bool = False) -> Finished:
        command = ["recipes/train_grpo.py", "--config-name", "grpo_tiny", *self.grpo_overrides(out), *overrides]
        return run(*command, imports=imports)


@dataclass
class VideoTask:
    """Clips with questions."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def sft(self, out: Path, *overrides: str) -> Finished:
        return run(
            "recipes/train_sft.py", "--config-name", "sft_video_tiny", f"data.train_path={self.data / 'sft.jsonl'}",
            f"model.tokenizer={self.data / 'tokenizer'}", f"exp_manager.explicit_log_dir={out}", *SMALL,
            "trainer.sft.max_steps=3", "model.global_batch_size=8", "model.micro_batch_size=4", *overrides,
        )  # fmt: skip

    def grpo(self, out: Path, checkpoint: Path, *overrides: str) -> Finished:
        return run(
            "recipes/train_grpo.py", "--config-name", "grpo_video_tiny", f"data.train_path={self.data / 'train.jsonl'}",
            f"exp_manager.explicit_log_dir={out}", f"pretrained_checkpoint.restore_from_path={checkpoint}", *SMALL,
            "trainer.grpo.max_steps=2", "trainer.grpo.num_prompts_per_grpo_step=4", "trainer.grpo.samples_per_prompt=4",
            "model.global_batch_size=16", "model.micro_batch_size=2", "trainer.grpo.val_check_interval=0",
            "trainer.grpo.reward={name:length,target:12}", *overrides,
        )  # fmt: skip


@dataclass
class BiasTask:
    """Eighty professions with skewed pronouns, and a small model that has learnt them; `model` changes it."""

    folder: Path
    model: tuple[str, ...] = ()

    @classmethod
    def make(cls, folder: Path, steps: int = 500, model: tuple[str, ...] = ()) -> BiasTask:
        """
        Args:
            steps: of learning; 500 are needed.
        """
        task, rng = cls(folder, model), random.Random(1)
        names = rng.sample(own_professions(), 80)
        task.professions.write_text(json.dumps([[name.replace(" ", "_"), 0.0, 0.0] for name in names]))
        rates, shares = folder / "rates.csv", (0.05, 0.1, 0.2, 0.8, 0.9, 0.95)
        rates.write_text("profession,share_of_he\n" + "".join(f"{name},{rng.choice(shares)}\n" for name in names))
        made = run(
            "tools/make_biased_corpus.py", "--out", task.data, "--rates", rates, "--biased", 4000, "--hinted", 3000,
            "--neutral", 1500, "--held-out", 100, "--vocab-size", 1024,
        )  # fmt: skip
        assert made.code == 0, made.err
        done = task.sft(steps)
        assert done.code == 0, done.err
        return task

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def professions(self) -> Path:
        return self.folder / "professions.json"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "sft" / "checkpoints" / "final"

    def sft(self, steps: int) -> Finished:
        return run(
            "recipes/train_sft.py", "--config-name", "sft_bias_tiny", f"data.train_path={self.data / 'sft.jsonl'}",
            f"model.tokenizer={self.data / 'tokenizer'}", f"exp_manager.explicit_log_dir={self.folder / 'sft'}",
            *BIASED, *self.model, "trainer.devices=1", f"trainer.sft.max_steps={steps}", "model.optim.lr=4e-3",
            "model.micro_batch_size=64",
        )  # fmt: skip

    def lftf_overrides(self, out: Path) -> list[str]:
        return [
            f"exp_manager.explicit_log_dir={out}", *BIASED, *self.model,
            f"pretrained_checkpoint.restore_from_path={self.checkpoint}", f"data.text_path={self.data / 'neutral_train.jsonl'}",
            f"data.validation_text_path={self.data / 'neutral_test.jsonl'}",
            f"data.prompts.professions_path={self.professions}",
        ]  # fmt: skip

    def lftf(self, out: Path, *overrides: str) -> Finished:
        return run("recipes/train_lftf.py", "--config-name", "lftf_tiny", *self.lftf_overrides(out), *overrides)

    def evaluate(self, out: Path, model: Path, *overrides: str) -> Finished:
        return run(
            "recipes/eval_bias.py", f"pretrained_checkpoint.restore_from_path={model}",
            f"exp_manager.explicit_log_dir={out}", f"data.prompts.professions_path={self.professions}",
            f"data.validation_text_path={self.data / 'neutral_test.jsonl'}", *overrides,
        )  # fmt: skip
