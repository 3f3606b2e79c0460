"""Bad input: one clear line, exit code 2, no traceback, nothing written."""

import json

import pytest

pytestmark = pytest.mark.functional


def check(done, out, *words):
    assert done.code == 2, (done.code, done.err)
    assert "Traceback" not in done.err
    assert len(done.error_lines) == 1, done.err
    for word in words:
        assert word in done.error_lines[0], done.error_lines
    assert not out.exists(), "the run folder must not be made"


CASES = {
    "unknown key": (["+model.hiden_size=64"], ["model.hiden_size", "model.hidden_size"]),
    "missing file": (["data.train_path=nowhere.jsonl"], ["nowhere.jsonl"]),
    "heads not divisible": (
        ["model.tensor_model_parallel_size=3", "trainer.devices=3"],
        ["num_attention_heads=4", "tensor_model_parallel_size=3"],
    ),
    "world not divisible": (
        ["model.pipeline_model_parallel_size=2", "trainer.devices=3"],
        ["3", "pipeline_model_parallel_size=2"],
    ),
    "dropout": (["model.attention_dropout=0.1"], ["attention_dropout=0.1", "set it to 0"]),
    "prompt too long": (["data.max_prompt_length=20"], ["train.jsonl:1", "20", "data.max_prompt_length"]),
    "unknown reward": (["trainer.grpo.reward=exact_anser"], ["exact_answer"]),
}


@pytest.mark.parametrize("name", CASES)
def test_grpo_refuses(task, tmp_path, name):
    overrides, words = CASES[name]
    check(task.grpo(tmp_path / "run", *overrides), tmp_path / "run", *words)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "a", ', ["bad.jsonl:2"]),
        (json.dumps({"prompt": "", "answer": "1"}), ["bad.jsonl:2", "empty"]),
    ],
    ids=["malformed", "empty-prompt"],
)
def test_bad_rows_name_the_line(task, tmp_path, row, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "Question: x", "answer": "1"}) + "\n" + row + "\n")
    check(task.grpo(tmp_path / "run", f"data.train_path={path}"), tmp_path / "run", *words)


REWARDS = """
def raises(responses, rows):
    raise KeyError("colour")

def gives_nan(responses, rows):
    return [float("nan")] * len(responses)
"""


@pytest.mark.parametrize(("name", "words"), [("raises", ["KeyError", "colour"]), ("gives_nan", ["nan"])])
def test_reward_errors_stop_the_run(task, tmp_path, monkeypatch, name, words):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = task.grpo(tmp_path / "run", f"trainer.grpo.reward=my_rewards.{name}")
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert len(done.error_lines) == 1 and f"my_rewards.{name}" in done.error_lines[0]
    assert any(word.lower() in done.error_lines[0].lower() for word in words)


def test_another_runs_folder_is_left_alone(task, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("precious\n")
    done = task.grpo(out)
    assert done.code == 2 and "Traceback" not in done.err
    assert len(done.error_lines) == 1 and "nothing is overwritten" in done.error_lines[0]
    assert [p.name for p in out.iterdir()] == ["metrics.jsonl"]
    assert (out / "metrics.jsonl").read_text() == "precious\n"
