"""GRPO with several held-out sets: the same numbers on any layout, and the best checkpoint by one of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.recipe_runs import metrics
from tests.saved_weights import saved_weights

pytestmark = pytest.mark.functional


def test_sets_of_several_answers_on_any_layout(task, tmp_path, world):
    drawn = "samples: 6, sampling_params: {use_greedy: false, temperature: 0.7}, right_from: 0.7"
    held_out = task.data / "test.jsonl"
    sets = f"data.validation_sets={{words: {{path: {held_out}, {drawn}}}, same: {{path: {held_out}}}}}"
    common = [
        sets, "trainer.grpo.max_steps=2", "trainer.grpo.val_check_interval=1",
        "exp_manager.checkpoint_callback_params.monitor=val_rollouts/words/pass_at_2", "trainer.grpo.save_interval=1",
    ]  # fmt: skip
    layouts = {"one": ["trainer.devices=1"], "data": ["trainer.devices=2"],
               "tensor": ["trainer.devices=2", "model.tensor_model_parallel_size=2"],
               "context": ["trainer.devices=2", "model.context_parallel_size=2"]}  # fmt: skip
    rows = {}
    for name, layout in layouts.items():
        asked = tmp_path / f"{name}.asked"
        done = task.grpo(
            tmp_path / name, *common, *layout, f"exp_manager.save_hf={str(name == 'tensor').lower()}",
            "trainer.grpo.reward=null", f"trainer.grpo.reward={{name: tests.programs.own_rewards.Noted, file: {asked}}}",
        )  # fmt: skip
        assert done.code == 0, done.err
        # 8 rows with 6 answers and 8 with 1 at three validations, and 16 responses of two steps: by no rank twice.
        assert len(asked.read_text().split()) == 3 * (8 * 6 + 8) + 2 * 16
        (rows[name], *_) = metrics(tmp_path / name)  # of the weights that all begin with
    found = {key: value for key, value in rows["one"].items() if key.startswith("val_rollouts/")}
    measured = ("reward", "response_length", "truncated")
    several = (*measured, "right", "pass_at_2", "pass_at_4", "pass_at_6", "majority_at_6")
    assert set(found) == {*(f"val_rollouts/same/{x}" for x in measured), *(f"val_rollouts/words/{x}" for x in several)}
    assert (
        0
        < found["val_rollouts/words/right"]
        <= found["val_rollouts/words/pass_at_2"]
        <= found["val_rollouts/words/pass_at_6"]
        <= 1
    )
    assert found["val_rollouts/words/reward"] != found["val_rollouts/same/reward"]
    for name in ("data", "tensor", "context"):
        assert {key: rows[name][key] for key in found} == pytest.approx(found, abs=1e-6), name
    steps = [row for row in metrics(tmp_path / "one") if row["step"]]
    best = max(steps, key=lambda row: (row["val_rollouts/words/pass_at_2"], row["step"]))["step"]
    assert (tmp_path / "one/checkpoints/best").resolve().name == f"step-{best}"
    assert not list((tmp_path / "one/checkpoints").glob("hf*"))
    checkpoints = tmp_path / "tensor/checkpoints"
    assert (checkpoints / "hf").resolve().name == f"hf-{(checkpoints / 'best').resolve().name}"
    assert len(list(checkpoints.glob("hf-step-*"))) == 1
    ours, theirs = saved_weights(checkpoints / "best", world), load_file(checkpoints / "hf/model.safetensors")
    assert torch.equal(ours["decoder.final_layernorm.weight"], theirs["model.norm.weight"])
    assert (checkpoints / "hf/tokenizer.json").is_file() and not (tmp_path / "tensor/.tokenizer").exists()


def test_sets_that_cannot_be_are_refused(task, tmp_path):
    held_out = task.data / "test.jsonl"
    for override, words in [
        (
            f"data.validation_sets={{a: {{path: {held_out}, samples: 2}}}}",
            "data.validation_sets.a.samples=2: greedy answers",
        ),
        ("data.validation_sets={a: {path: /nosuch.jsonl}}", "/nosuch.jsonl"),
    ]:
        done = task.grpo(tmp_path / "run", override, "trainer.grpo.val_check_interval=1", "trainer.devices=1")
        assert done.code == 2 and words in done.error_lines[0], done.err
    both = task.grpo(
        tmp_path / "run", f"data.validation_path={held_out}", f"data.validation_sets={{a: {{path: {held_out}}}}}"
    )
    assert both.code == 2 and "are both set" in both.error_lines[0]
    assert not (tmp_path / "run").exists()
