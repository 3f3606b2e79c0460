"""Two versions of Megatron-Core, each in an environment of its own, train alike and read each other's checkpoints.

The other interpreter is named in OTHER_PYTHON; CI has both.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing, package_info

from tests.recipe_runs import ROOT, BiasTask, Finished, metrics, run

OTHER = os.environ.get("OTHER_PYTHON")
pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(not OTHER, reason="needs OTHER_PYTHON, an interpreter with another megatron-core"),
]

ALWAYS = ["trainer.devices=1", "exp_manager.checkpoint_callback_params.save_top_k=-1"]
RESUME = "exp_manager.resume_if_exists=true"
LOSS = "train_optim/loss"


def there(*arguments: object) -> Finished:
    """Run a script in the other environment."""
    done = subprocess.run(
        [OTHER, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def test_the_environments_have_different_versions():
    done = there("-c", "from megatron.core import package_info; print(package_info.__version__)")
    assert done.code == 0, done.err
    assert done.out.split()[-1] != package_info.__version__


@pytest.fixture(scope="module", params=["sft", "grpo", "lftf"])
def recipe(request, task, tmp_path_factory):
    """(what is run, the overrides for a folder) of each recipe: five steps from one checkpoint."""
    if request.param == "sft":
        command = ["recipes/train_sft.py", "--config-name", "sft_tiny"]
        start = f"pretrained_checkpoint.restore_from_path={task.checkpoint}"
        return (
            command,
            lambda out: [*task.sft_overrides(out), start, "trainer.sft.save_interval=1"],
            "trainer.sft.max_steps",
        )
    if request.param == "grpo":
        command = ["-m", "tests.programs.given_responses", "--config-name", "grpo_tiny"]
        return (
            command,
            lambda out: [*task.grpo_overrides(out), "trainer.grpo.save_interval=1"],
            "trainer.grpo.max_steps",
        )
    biased = BiasTask.make(tmp_path_factory.mktemp("biased"), steps=5)
    more = ["trainer.lftf.block=1", "trainer.lftf.save_interval=1", "trainer.lftf.val_check_interval=5",
            "trainer.lftf.min_pronoun_mass=0", "trainer.lftf.max_perplexity=null"]  # fmt: skip
    return (
        ["recipes/train_lftf.py", "--config-name", "lftf_tiny"],
        lambda out: [*biased.lftf_overrides(out), *more],
        "trainer.lftf.max_steps",
    )


def test_five_steps_are_the_same_and_each_goes_on_from_the_others_checkpoint(recipe, world, tmp_path: Path):
    command, overrides, steps = recipe
    runs = {"here": run, "there": there}
    for name, start in runs.items():
        arguments = [*command, *overrides(tmp_path / name), *ALWAYS, f"{steps}=5"]
        done = start(*arguments, 'trainer.max_time_per_run="00:00:00:00"')
        assert done.code == 0, done.err
        done = runs["here" if name == "there" else "there"](*arguments, RESUME)
        assert done.code == 0 and "going on after step 1" in done.out + done.err, done.err
    here, other = ([row for row in metrics(tmp_path / name) if LOSS in row] for name in runs)
    assert [row["step"] for row in here] == [row["step"] for row in other] == [1, 2, 3, 4, 5]
    for key in (LOSS, "train_optim/grad_norm"):
        assert here[0][key] == pytest.approx(other[0][key], rel=1e-6)
        assert [row[key] for row in here] == pytest.approx([row[key] for row in other], rel=1e-4)
    assert len({row[LOSS] for row in here}) == 5, "nothing was learnt: the test could not fail"
    gradients, others = (first_moments(tmp_path / name) for name in runs)
    assert gradients.keys() == others.keys() and gradients
    for name, value in gradients.items():  # after one step: the gradient, times 1 - beta
        assert (value - others[name]).abs().max() <= 1e-6 * max(float(value.abs().max()), 1e-6), name


def first_moments(run_folder: Path) -> dict:
    tensors = dist_checkpointing.load_plain_tensors(str(run_folder / "checkpoints/step-1/optimizer"))
    return {name: value for name, value in tensors.items() if "exp_avg." in name}
