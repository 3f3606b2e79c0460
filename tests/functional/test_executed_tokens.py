"""The grouped flag really lowers what the layers execute: rows are counted inside the first attention layer."""

import json

import pytest

from recipes.cli.compose import compose
from tests.recipe_runs import metrics, run

pytestmark = pytest.mark.functional


def executed_rows(task, folder, *overrides):
    folder.mkdir()
    arguments = [*task.grpo_overrides(folder / "run"), "trainer.devices=1", "trainer.grpo.max_steps=1", *overrides]
    cfg = compose("grpo_tiny", [f"++{a}" for a in arguments], may_be_unset=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    done = run("-m", "tests.programs.count_rows", folder / "config.json", folder / "rows.json")
    assert done.code == 0, done.err
    return json.loads((folder / "rows.json").read_text()), metrics(folder / "run")[0]


REJECT = "trainer.grpo.off_policy={reject_above: 100}"


@pytest.mark.parametrize(("overrides", "passes"), [((), 2), ((REJECT,), 3)], ids=["without old", "with old"])
def test_rows_of_all_passes(overrides, passes, task, tmp_path):
    """The reference's and the actor's; the old policy's, too, where a response may be left out for it."""
    grouped, told = executed_rows(task, tmp_path / "grouped", *overrides)
    repeated, told_repeated = executed_rows(task, tmp_path / "repeated", "model.prefix_grouping=false", *overrides)
    microbatches = 2  # 4 prompts, 2 in each
    for rows in grouped, repeated:
        assert len(rows) == passes * microbatches
        assert rows == passes * rows[:microbatches]
    assert sum(grouped) == told["train_optim/tokens_executed"]
    assert sum(repeated) == told_repeated["train_optim/tokens_executed"]
    assert sum(grouped) < 0.45 * sum(repeated)  # 4 responses of 8 tokens behind some 100 tokens of prompt


def test_responses_that_begin_alike_share_their_beginning(task, tmp_path):
    """Drawn from two tokens each, responses of a prompt agree for a while: a tree of them trains the same and costs less."""
    few = ("trainer.grpo.sampling_params.top_k=2", "model.micro_batch_size=4")
    groups, told = executed_rows(task, tmp_path / "groups", *few)
    trees, told_trees = executed_rows(task, tmp_path / "trees", *few, "model.min_shared_tokens=1")
    assert sum(trees) < sum(groups)
    assert told_trees["train_optim/tokens_repeated"] == told["train_optim/tokens_repeated"]
    assert told_trees["train_rollouts/reward"] == told["train_rollouts/reward"]
    for name in ("train_optim/grad_norm", "train_optim/loss", "train_optim/kl"):
        assert told_trees[name] == pytest.approx(told[name], rel=1e-4, abs=1e-6)
