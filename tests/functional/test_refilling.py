"""Dynamic sampling: groups without signal are sampled anew, the same ones however ranks are laid out, up to a limit."""

import pytest

from recipes.grpo.dump_files import read_step, step_files
from tests.recipe_runs import metrics

pytestmark = pytest.mark.functional

GRPO = ["trainer.grpo.rollout_dump={}", "trainer.grpo.max_steps=2", "trainer.grpo.save_interval=1"]
SOME = ["trainer.grpo.reward=tests.programs.own_rewards.of_a_third", "trainer.grpo.max_sampling_rounds=10"]


def groups_of(out) -> list[list[dict]]:
    return [[group for _, group in read_step(path).groups] for path in step_files(out / "rollouts").values()]


@pytest.fixture(scope="module")
def refilled(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("refilled") / "run"
    done = task.grpo(out, *GRPO, *SOME)
    assert done.code == 0, done.err
    return out


def test_what_is_trained_has_a_signal_and_the_rest_is_told_of(refilled):
    rows = metrics(refilled)
    for row, groups in zip(rows, groups_of(refilled), strict=True):
        assert all(len({r["reward"] for r in group["responses"]}) > 1 for group in groups)
        sampled = 4 * row["train_rollouts/sampling_rounds"]
        assert row["train_rollouts/thrown_away"] == pytest.approx(1 - 4 / sampled)
        assert row["train_rollouts/groups_with_signal"] * sampled >= 4
        keys = [group["key"] for group in groups]
        assert [group["number"] for group in groups] == [0, 1, 2, 3]
        assert keys == sorted(keys) and len({tuple(key) for key in keys}) == 4 and keys[-1][2] >= sampled - 4
    assert max(row["train_rollouts/sampling_rounds"] for row in rows) > 1


def test_layouts_train_the_same_groups(task, refilled, tmp_path):
    done = task.grpo(tmp_path / "run", *GRPO, *SOME, "trainer.grpo.max_steps=1", "model.tensor_model_parallel_size=2")
    assert done.code == 0, done.err
    (ours, *_), (theirs,) = groups_of(refilled), groups_of(tmp_path / "run")
    assert [(g["key"], g["prompt_tokens"]) for g in ours] == [(g["key"], g["prompt_tokens"]) for g in theirs]
    one, other = metrics(refilled)[0], metrics(tmp_path / "run")[0]
    for key in ("train_rollouts/reward", "train_rollouts/thrown_away", "train_optim/grad_norm"):
        assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_at_the_limit_others_stand_in_and_the_run_says_so(task, tmp_path):
    done = task.grpo(
        tmp_path / "run", "trainer.grpo.max_steps=1", "trainer.grpo.max_sampling_rounds=2",
        "trainer.grpo.reward=tests.programs.own_rewards.nothing",
    )  # fmt: skip
    assert done.code == 0, done.err
    said = "step 1: 0 of 8 groups have rewards that differ, and a step takes 4: after trainer.grpo.max_sampling_rounds=2 others"
    assert said in done.out + done.err
    (row,) = metrics(tmp_path / "run")
    assert row["train_rollouts/sampling_rounds"] == 2 and row["train_rollouts/thrown_away"] == 0.5
    assert row["train_rollouts/groups_with_signal"] == 0


def test_a_mixture_that_ends_before_the_steps_do_ends_the_run_with_its_checkpoint(task, tmp_path):
    """22 rows are enough for five steps of four, and not where each step asks twice."""
    sets = f"{{all: {{path: {task.data / 'train.jsonl'}, epochs: 0.46}}}}"
    given = [
        "data.train_path=null", f"data.train_sets={sets}", "trainer.grpo.max_steps=5", "trainer.grpo.max_sampling_rounds=2",
        "trainer.grpo.reward=tests.programs.own_rewards.nothing",
    ]  # fmt: skip
    done = task.grpo(tmp_path / "run", *given)
    assert done.code == 0, done.err
    said = done.out + done.err
    assert (
        "step 3: 0 of 4 groups have rewards that differ, and a step takes 4: as there are no more rows to draw" in said
    )
    assert "all sets of data.train_sets have been drawn as often as their epochs say, and the run ends" in said
    assert [row["train_rollouts/sampling_rounds"] for row in metrics(tmp_path / "run")] == [2, 2, 1]
    final = tmp_path / "run/checkpoints/final"
    assert final.readlink().name == "step-3"
    again = task.grpo(tmp_path / "run", *given, "exp_manager.resume_if_exists=true")
    assert again.code == 0 and final.readlink().name == "step-3", again.err
    assert len(metrics(tmp_path / "run")) == 3
