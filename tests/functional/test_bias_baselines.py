"""What LFTF is compared with: an edit in closed form, steering, GRPO of the rarer pronoun."""

from __future__ import annotations

import json

import pytest

from tests.recipe_runs import BIASED, metrics, run


def test_an_edit_and_steering_are_measured_like_a_fine_tuning(bias_task, tmp_path):
    held_out = ["--validation-text", bias_task.data / "neutral_test.jsonl", "--professions", bias_task.professions]
    place = ["--block", 1, *held_out]
    results = {}
    for name, more in (("edit", ["--text", bias_task.data / "neutral_train.jsonl"]), ("steer", [])):
        done = run("tools/bias_baselines.py", name, bias_task.checkpoint, "--out", tmp_path / name, *place, *more)
        assert done.code == 0, done.err
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
        after = results[name]["after"]
        assert f"{after['afgb']:.4f}" in (tmp_path / name / "report.md").read_text()
        assert after["profession_table"] != results[name]["before"]["profession_table"]
    assert results["edit"]["before"] == results["steer"]["before"]
    # What hints say is what the direction is made of.
    assert results["steer"]["after"]["ub"] < results["steer"]["before"]["ub"]
    again = ["other", bias_task.checkpoint, "--checkpoint", bias_task.checkpoint, *held_out]
    done = run("tools/bias_baselines.py", *again, "--out", tmp_path / "same")
    assert done.code == 0, done.err
    same = json.loads((tmp_path / "same" / "result.json").read_text())
    assert same["before"] == same["after"] == results["edit"]["before"]


def test_grpo_of_the_rarer_pronoun(bias_task, tmp_path):
    done = run(
        "recipes/train_grpo.py", "--config-name", "grpo_bias_tiny", f"data.train_path={bias_task.data / 'grpo.jsonl'}",
        f"pretrained_checkpoint.restore_from_path={bias_task.checkpoint}", f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        *BIASED, "trainer.devices=1", "trainer.grpo.max_steps=2", "trainer.grpo.num_prompts_per_grpo_step=8",
        "model.global_batch_size=128",
    )  # fmt: skip
    assert done.code == 0, done.err
    steps = metrics(tmp_path / "run")
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["train_rollouts/reward"] <= 1.5 and step["train_optim/grad_norm"] > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["edit", "m"], "error: edit needs --text"),
        (["other", "m"], "error: other needs --checkpoint"),
        (["edit", "m", "--text", "t", "--weight", "0"], "error: --weight 0 must be a number above 0"),
        (["edit", "m", "--text", "t", "--weight", "nan"], "error: --weight nan must be a number above 0"),
        (["steer", "m", "--strength", "inf"], "error: --strength inf must be a number"),
    ],
)
def test_what_is_missing_is_one_line(arguments, line, tmp_path):
    done = run("tools/bias_baselines.py", *arguments, "--out", tmp_path / "out")
    assert done.code == 2 and done.error_lines == [line], done.err
