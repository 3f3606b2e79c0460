"""A small task and a model that has seen a few steps of it, made once per worker."""

import pytest

from tests.recipe_runs import Task, run


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
