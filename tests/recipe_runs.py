"""Run recipes as a user runs them: a command line, real files, real processes."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"]
BIASED = ["model.num_layers=3", "model.hidden_size=64", "model.ffn_hidden_size=128"]


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

    def sft(self, out: Path, *overrides: str) -> Finished:
        return run(
            "recipes/train_sft.py", "--config-name", "sft_tiny", f"data.train_path={self.data / 'sft.jsonl'}",
            f"model.tokenizer={self.data / 'tokenizer'}", f"exp_manager.explicit_log_dir={out}", *SMALL,
            "trainer.sft.max_steps=3", "model.global_batch_size=8", "model.micro_batch_size=4", *overrides,
        )  # fmt: skip

    def grpo_overrides(self, out: Path) -> list[str]:
        # A reward that no model hits all the time: with equal rewards a group has no gradient.
        return [
            f"data.train_path={self.data / 'train.jsonl'}", f"exp_manager.explicit_log_dir={out}",
            f"pretrained_checkpoint.restore_from_path={self.checkpoint}", *SMALL, "trainer.grpo.max_steps=3",
            "trainer.grpo.num_prompts_per_grpo_step=4", "trainer.grpo.samples_per_prompt=4", "model.global_batch_size=16",
            "model.micro_batch_size=2", "trainer.grpo.val_check_interval=0", "trainer.grpo.length_params.max_length=8",
            "trainer.grpo.reward={name:length,target:12}",
        ]  # fmt: skip

    def grpo(self, out: Path, *overrides: str) -> Finished:
        return run("recipes/train_grpo.py", "--config-name", "grpo_tiny", *self.grpo_overrides(out), *overrides)


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
    """Eighty professions with skewed pronouns, and a small model that has learnt them."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def professions(self) -> Path:
        return self.folder / "professions.json"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "sft" / "checkpoints" / "final"

    def sft(self) -> Finished:
        return run(
            "recipes/train_sft.py", "--config-name", "sft_bias_tiny", f"data.train_path={self.data / 'sft.jsonl'}",
            f"model.tokenizer={self.data / 'tokenizer'}", f"exp_manager.explicit_log_dir={self.folder / 'sft'}",
            *BIASED, "trainer.devices=1", "trainer.sft.max_steps=500", "model.optim.lr=4e-3",
            "model.micro_batch_size=64",
        )  # fmt: skip

    def lftf(self, out: Path, *overrides: str) -> Finished:
        return run(
            "recipes/train_lftf.py", "--config-name", "lftf_tiny", f"exp_manager.explicit_log_dir={out}", *BIASED,
            f"pretrained_checkpoint.restore_from_path={self.checkpoint}",
            f"data.text_path={self.data / 'neutral_train.jsonl'}",
            f"data.validation_text_path={self.data / 'neutral_test.jsonl'}",
            f"data.prompts.professions_path={self.professions}", *overrides,
        )  # fmt: skip

    def evaluate(self, out: Path, model: Path, *overrides: str) -> Finished:
        return run(
            "recipes/eval_bias.py", f"pretrained_checkpoint.restore_from_path={model}",
            f"exp_manager.explicit_log_dir={out}", f"data.prompts.professions_path={self.professions}",
            f"data.validation_text_path={self.data / 'neutral_test.jsonl'}", *overrides,
        )  # fmt: skip
