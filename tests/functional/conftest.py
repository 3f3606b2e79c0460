"""A small task and a model that has seen a few steps of it, made once per worker."""

import json
import random

import pytest

from megatron_ext.bias.prompts import own_professions
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
    """A model that says "he" or "she" of each profession at its own rate, and follows hints."""
    task = BiasTask(tmp_path_factory.mktemp("bias_task"))
    rng = random.Random(1)
    names = rng.sample(own_professions(), 80)
    task.professions.write_text(json.dumps([[name.replace(" ", "_"), 0.0, 0.0] for name in names]))
    rates = task.folder / "rates.csv"
    shares = (0.05, 0.1, 0.2, 0.8, 0.9, 0.95)
    rates.write_text("profession,share_of_he\n" + "".join(f"{name},{rng.choice(shares)}\n" for name in names))
    made = run(
        "tools/make_biased_corpus.py", "--out", task.data, "--rates", rates, "--biased", 4000, "--hinted", 3000,
        "--neutral", 1500, "--held-out", 100, "--vocab-size", 1024,
    )  # fmt: skip
    assert made.code == 0, made.err
    done = task.sft()
    assert done.code == 0, done.err
    return task
