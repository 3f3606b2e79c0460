"""Recipes run as a user runs them: a command line, real files, real processes."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"]


@dataclass
class Finished:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def run(*arguments: object, timeout: float = 240) -> Finished:
    """Run a script of the repository with this interpreter."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


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

    def sft(self, out: Path, *overrides: str) -> Finished:
        return run(
            "recipes/train_sft.py", "--config-name", "sft_tiny", f"data.train_path={self.data / 'sft.jsonl'}",
            f"model.tokenizer={self.data / 'tokenizer'}", f"exp_manager.explicit_log_dir={out}", *SMALL,
            "trainer.sft.max_steps=3", "model.global_batch_size=8", "model.micro_batch_size=4", *overrides,
        )  # fmt: skip

    def grpo(self, out: Path, *overrides: str) -> Finished:
        return run(
            "recipes/train_grpo.py", "--config-name", "grpo_tiny", f"data.train_path={self.data / 'train.jsonl'}",
            f"exp_manager.explicit_log_dir={out}", f"pretrained_checkpoint.restore_from_path={self.checkpoint}", *SMALL,
            "trainer.grpo.max_steps=3", "trainer.grpo.num_prompts_per_grpo_step=4", "trainer.grpo.samples_per_prompt=4",
            "model.global_batch_size=16", "model.micro_batch_size=2", "trainer.grpo.val_check_interval=0",
            "trainer.grpo.length_params.max_length=8", *overrides,
        )  # fmt: skip


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Task:
    folder = tmp_path_factory.mktemp("task")
    task = Task(folder)
    made = run(
        "tools/make_word_problems.py", "--out", task.data, "--seed", 5, "--sft", 64, "--train", 48, "--test", 8
    )
    assert made.code == 0, made.err
    done = task.sft(folder / "sft", f"data.validation_path={task.data / 'test.jsonl'}", "trainer.sft.val_check_interval=3")
    assert done.code == 0, done.err
    return task
