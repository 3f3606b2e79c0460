"""Bad input: one clear line, exit code 2, no traceback, nothing written."""

import json
import shutil

import pytest

from recipes import train_grpo
from recipes.cli.compose import compose
from recipes.cli.errors import is_user_error
from recipes.run.log_process import LogProcess
from tests.harness import ROOT

pytestmark = pytest.mark.functional


def check(done, out, *words):
    assert done.code == 2, (done.code, done.err)
    assert "Traceback" not in done.err
    assert len(done.error_lines) == 1, done.err
    for word in words:
        assert word in done.error_lines[0], done.error_lines
    assert not out.exists(), "the run folder must not be made"


def test_unknown_key_names_the_nearest(task, tmp_path):
    done = task.grpo(tmp_path / "run", "model.hiden_size=64")
    check(done, tmp_path / "run", "model.hiden_size", "did you mean model.hidden_size?")


def test_a_bad_row_names_its_line(task, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "Question: x", "answer": "1"}) + '\n{"prompt": "a", \n')
    check(task.grpo(tmp_path / "run", f"data.train_path={path}"), tmp_path / "run", "bad.jsonl:2")


def test_srun_without_torchrun(task, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    check(task.grpo(tmp_path / "run"), tmp_path / "run", "srun started 4 tasks", "one torchrun per node")


# The same refusals without the cost of a process each: what `main` raises is what the launcher prints.
CASES = {
    "missing file": (["data.train_path=nowhere.jsonl"], ["cannot read nowhere.jsonl", "No such file"]),
    "heads not divisible": (
        ["model.tensor_model_parallel_size=3", "trainer.devices=3"],
        ["num_attention_heads=4", "tensor_model_parallel_size=3"],
    ),
    "layers not divisible": (
        ["model.pipeline_model_parallel_size=3"],
        ["num_layers=2", "pipeline_model_parallel_size=3"],
    ),
    "world not divisible": (["model.tensor_model_parallel_size=2"], ["1 processes", "tensor_model_parallel_size=2"]),
    "launcher disagrees": (["trainer.devices=4"], ["trainer.devices=4", "1 processes"]),
    "dropout": (["model.attention_dropout=0.1"], ["attention_dropout=0.1", "set it to 0"]),
    "prompt too long": (
        ["data.max_prompt_length=20", "data.overlong=error"],
        ["train.jsonl:1", "data.max_prompt_length=20"],
    ),
    "empty prompt": (["data.train_path={empty}"], ["empty.jsonl:1", "prompt is empty"]),
    "no answer": (
        ["data.train_path={unanswered}", "trainer.grpo.reward=exact_answer"],
        ["unanswered.jsonl:2", "no answer"],
    ),
    "nowhere to write": (["exp_manager.explicit_log_dir={empty}/run"], ["empty.jsonl is no folder to write to"]),
    "unknown reward": (["trainer.grpo.reward=exact_anser"], ["did you mean exact_answer?"]),
    "wrong type": (["model.num_layers=two"], ["model.num_layers", "int"]),
    "group does not fit": (["model.global_batch_size=18"], ["global_batch_size=18", "samples_per_prompt=4"]),
    "no such checkpoint": (
        ["pretrained_checkpoint.restore_from_path=/nowhere"],
        ["/nowhere", "not a complete checkpoint"],
    ),
    "another architecture": (["model.ffn_hidden_size=128"], ["ffn_hidden_size=128", "ffn_hidden_size=64"]),
}


@pytest.mark.parametrize("name", CASES)
def test_grpo_refuses(task, tmp_path, name):
    overrides, words = CASES[name]
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": "", "answer": "1"}) + "\n")
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text(
        json.dumps({"prompt": "Question", "answer": "1"}) + "\n" + json.dumps({"prompt": "Question"}) + "\n"
    )
    out = tmp_path / "run"
    files = {"empty": empty, "unanswered": unanswered}
    settings = [o if "{name" in o else o.format(**files) for o in overrides]
    arguments = [*task.grpo_overrides(out), "trainer.devices=1", *settings]
    cfg = compose("grpo_tiny", [f"++{a}" for a in arguments], may_be_unset=True)
    with pytest.raises(ValueError) as caught:
        train_grpo.main(cfg, LogProcess())
    message = str(caught.value)
    assert is_user_error(caught.value) and "\n" not in message
    for word in words:
        assert word in message
    assert not out.exists()


def test_a_reward_that_returns_nan_stops_all_ranks(task, tmp_path, monkeypatch):
    shutil.copy(ROOT / "tests/programs/own_rewards.py", tmp_path / "my_rewards.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = task.grpo(tmp_path / "run", "trainer.grpo.reward=my_rewards.gives_nan")
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert len(done.error_lines) == 1 and "my_rewards.gives_nan gave nan" in done.error_lines[0]


def test_another_runs_folder_is_left_alone(task, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("precious\n")
    done = task.grpo(out)
    assert done.code == 2 and "Traceback" not in done.err
    assert len(done.error_lines) == 1 and "nothing is overwritten" in done.error_lines[0]
    assert [p.name for p in out.iterdir()] == ["metrics.jsonl"]
    assert (out / "metrics.jsonl").read_text() == "precious\n"
