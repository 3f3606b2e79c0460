"""Objectives by name and of one's own, from the command line to the metrics, on one data-parallel rank and on two."""

import statistics

import pytest

from recipes.environments.environment import End, Environment, Observation
from recipes.grpo.dump_files import read_step, step_files
from tests.recipe_runs import metrics

pytestmark = pytest.mark.functional

CASES = {
    "dapo": [
        "trainer.grpo.objective={name: dapo, advantages: reinforce_plus_plus}",
        "trainer.grpo.high_entropy_share=0.5",
        "trainer.grpo.overlong_filtering=false",
        "trainer.grpo.length_params.max_length=8",
    ],
    "dr_grpo": ["trainer.grpo.objective=dr_grpo", "trainer.grpo.off_policy={level: token}"],
    "gpg": ["trainer.grpo.objective=gpg", "model.micro_batch_tokens=300"],
    "gdpo": [
        "trainer.grpo.objective={name: grpo, advantages: gdpo}",
        "trainer.grpo.reward=null",
        "trainer.grpo.rewards={size: {reward: {name: length, target: 12}}, "
        "long: {reward: tests.programs.own_rewards.plain, weight: 0.02}}",
        f"trainer.grpo.environment={__name__}.Hurrying",
        "trainer.grpo.sampling_params.stop_strings=[e, a, o]",
        "trainer.grpo.rollout_dump={}",
    ],
}
WEIGHTS = {"size": 1.0, "long": 0.02}


class Hurrying(Environment):
    """Pays for turns as they come, beside what rewards say of the last one."""

    def step(self, talk):
        return Observation(" And?", reward=len(talk.said)) if len(talk.turns) < 2 else End(0.5)


@pytest.mark.parametrize("name", CASES)
def test_the_first_step_is_the_same_on_one_data_parallel_rank_and_on_two(name, task, tmp_path):
    """Advantages and thresholds of the whole batch, and normalisers of all ranks."""
    steps = {}
    for layout in ("model.tensor_model_parallel_size=1", "model.tensor_model_parallel_size=2"):
        out = tmp_path / layout[-1]
        done = task.grpo(out, "trainer.grpo.max_steps=1", *CASES[name], layout)
        assert done.code == 0, done.err
        (steps[layout],) = metrics(out)
    one, two = steps.values()
    assert one["train_rollouts/reward"] == pytest.approx(two["train_rollouts/reward"], rel=1e-12)
    for key in ("train_optim/grad_norm", "train_optim/entropy"):
        assert one[key] == pytest.approx(two[key], rel=1e-4) and one[key] > 0
    for step in steps.values():
        assert step["train_optim/ratio"] == pytest.approx(1, abs=1e-6)  # a mean, whatever divides the loss
        if name == "dapo":
            assert 0.5 <= step["train_optim/high_entropy"] < 0.6
    if name == "gdpo":
        check_gdpo(tmp_path / "1")
        check_gdpo(tmp_path / "2")


def check_gdpo(out):
    """What was written down, of both ranks: advantages by hand out of each reward, and what the environment paid."""
    groups = [group["responses"] for _, group in read_step(step_files(out / "rollouts")[1]).groups]
    sums, paid = [[0.0] * 4 for _ in groups], 0
    for of_group, responses in zip(sums, groups, strict=True):
        turns = [r["reward"] - sum(w * r["rewards"][name] for name, w in WEIGHTS.items()) for r in responses]
        paid += sum(x > 0.5 for x in turns)
        for weight, values in [
            (1.0, turns),
            *((w, [r["rewards"][name] for r in responses]) for name, w in WEIGHTS.items()),
        ]:
            spread = statistics.stdev(values)
            for i, value in enumerate(values) if spread > 1e-9 else ():
                of_group[i] += weight * (value - statistics.mean(values)) / (spread + 1e-6)
    flat = [x for of_group in sums for x in of_group]
    assert paid > 0 and statistics.stdev(flat) > 0.1
    expected = [(x - statistics.mean(flat)) / (statistics.stdev(flat) + 1e-6) for x in flat]
    assert [r["advantage"] for responses in groups for r in responses] == pytest.approx(expected, abs=1e-5)


def test_one_of_ones_own_is_found_by_its_path(task, tmp_path):
    done = task.grpo(
        tmp_path / "run",
        "trainer.grpo.max_steps=1",
        "trainer.grpo.objective={name: tests.programs.own_objective.Mine, alpha: 3}",
    )
    assert done.code == 0, done.err
    assert "objective: name 'tests.programs.own_objective.Mine'" in done.out and "alpha 3.0" in done.out
    (step,) = metrics(tmp_path / "run")
    assert step["train_optim/grad_norm"] > 0 and step["train_optim/ratio"] == pytest.approx(1, abs=1e-6)


def test_what_an_objective_is_not_is_refused_in_one_line(task, tmp_path):
    done = task.grpo(tmp_path / "run", "trainer.grpo.objective=gspo", "trainer.grpo.token_level_loss=true")
    assert done.code != 0
    (line,) = done.error_lines
    assert "trainer.grpo.objective: gspo: normalisation=token contradicts this objective" in line
