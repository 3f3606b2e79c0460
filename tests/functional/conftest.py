"""A small task and a model that has seen a few steps of it, made once per worker; the biased one, which takes longest, once."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from megatron_ext.models import GPTModelConfig
from megatron_ext.runtime.checkpoint import read_checkpoint_info
from recipes.cli.config import build
from tests.bias_runs import weights
from tests.hf_llama import save_llama
from tests.recipe_runs import BiasTask, Task, VideoTask, run


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Task:
    folder = tmp_path_factory.mktemp("task")
    task = Task(folder)
    made = run("tools/make_word_problems.py", "--out", task.data, "--seed", 5, "--sft", 64, "--train", 48, "--test", 8)
    assert made.code == 0, made.err
    done = task.sft(
        folder / "sft", f"data.validation_path={task.data / 'test.jsonl'}", "trainer.sft.val_check_interval=3"
    )
    assert done.code == 0, done.err
    return task


@pytest.fixture(scope="session")
def video_task(tmp_path_factory) -> VideoTask:
    task = VideoTask(tmp_path_factory.mktemp("video_task"))
    made = run("tools/make_video_problems.py", "--out", task.data, "--seed", 3, "--sft", 32, "--train", 16, "--test", 8)
    assert made.code == 0, made.err
    return task


@pytest.fixture(scope="session")
def bias_task(tmp_path_factory) -> BiasTask:
    """A model that says "he" or "she" of each profession at its own rate, and follows hints. The worker that asks first makes it,
    and others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bias_task"
    made = folder / "made"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            BiasTask.make(folder)
            made.touch()
    return BiasTask(folder)


@pytest.fixture(scope="module")
def llama(bias_task, world, tmp_path_factory) -> Path:
    """The biased model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    config = build(GPTModelConfig, read_checkpoint_info(bias_task.checkpoint)["model"])
    save_llama(folder, weights(bias_task.checkpoint, world), config)
    shutil.copytree(bias_task.data / "tokenizer", folder, dirs_exist_ok=True)
    return folder
