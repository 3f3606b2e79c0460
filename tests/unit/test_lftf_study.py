"""What a study of blocks concludes from gains that are known."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from tests.harness import ROOT

sys.path.append(str(ROOT / "tools"))  # as its directory is where a tool is started

from tools.lftf_study import order_of
from tools.lftf_study_report import ESTIMATORS, by_budget, compared, decision, summary

BLOCKS, SEEDS = 12, (1, 2, 3)
BEFORE = {"afgb": 0.2, "ub": 0.5, "pronoun_mass": 0.4, "perplexity": 10.0}


def study(folder: Path, rng: torch.Generator, gains: list[float], **after: float) -> Path:
    """A folder as `run` leaves it: the estimators rank by the gains, against them, and by chance."""
    chance = torch.rand(BLOCKS, generator=rng).tolist()
    rankings = dict(zip(ESTIMATORS, (gains, [-gain for gain in gains], chance), strict=True))
    (folder / "plan.json").write_text(json.dumps({"blocks": BLOCKS, "model": "drawn"}))
    (folder / "before.json").write_text(json.dumps({"scores": BEFORE, "rankings": rankings}))
    for seed in SEEDS:
        for block, gain in enumerate(gains):
            scores = BEFORE | {"afgb": BEFORE["afgb"] * (1 - gain)} | after
            text = json.dumps({"block": block, "seed": seed, "scores": scores})
            (folder / f"block-{block}-seed-{seed}.json").write_text(text)
    return folder


def test_an_estimator_that_knows_the_gains_locates_and_its_contrary_does_not(tmp_path, rng):
    gains = torch.rand(BLOCKS, generator=rng).tolist()
    gains[3] = 1.5  # the best, below the upper half
    found = summary(study(tmp_path, rng, gains), guarded=False)
    assert found["gains"] == pytest.approx(gains) and found["best_block"] == 3
    right, wrong = (found["estimators"][name] for name in ESTIMATORS[:2])
    assert right["correlation"] == pytest.approx(1) and wrong["correlation"] == pytest.approx(-1)
    assert right["first"] == 3 and right["regret"] == pytest.approx(0)
    assert wrong["regret"] == pytest.approx(1.5 - min(gains))
    assert found["regret"]["random"] == pytest.approx(1.5 - sum(gains) / BLOCKS)
    told = decision(found)
    assert told[ESTIMATORS[0]] == "locates, worth its pass" and told[ESTIMATORS[1]] == "does not locate"


def test_where_seeds_differ_as_much_as_blocks_locating_cannot_matter(tmp_path, rng):
    gains = torch.rand(BLOCKS, generator=rng).tolist()
    folder = study(tmp_path, rng, gains)
    found = summary(folder, guarded=False)
    assert found["matters"] is True and set(found["estimators"][ESTIMATORS[0]]["regret_by_seed"].values()) == {0.0}
    shifts = {1: 0.0, 2: 0.5, 3: 1.0}  # a deviation of 0.5
    for path in folder.glob("block-*.json"):
        one = json.loads(path.read_text())
        one["scores"]["afgb"] -= BEFORE["afgb"] * shifts[one["seed"]]
        path.write_text(json.dumps(one))
    found = summary(folder, guarded=False)
    assert found["spread"] == pytest.approx([0.5] * BLOCKS) and found["matters"] is False
    wrong = found["estimators"][ESTIMATORS[1]]["regret_by_seed"]
    assert list(wrong.values()) == pytest.approx([max(gains) - min(gains)] * 3)


def test_a_state_that_the_guard_refuses_gains_nothing(tmp_path, rng):
    folder = study(tmp_path, rng, torch.rand(BLOCKS, generator=rng).tolist(), pronoun_mass=0.1)
    assert summary(folder, guarded=True)["gains"] == [0.0] * BLOCKS and max(summary(folder, guarded=False)["gains"]) > 0


def test_where_one_side_is_all_alike_there_is_no_correlation(tmp_path, rng):
    found = summary(study(tmp_path, rng, [0.25] * BLOCKS), guarded=False)
    assert all(math.isnan(one["correlation"]) for one in found["estimators"].values())


def test_a_budget_on_the_way_is_compared_by_what_was_scored_then(tmp_path, rng):
    """The gains of four steps are the other way round."""
    gains = torch.rand(BLOCKS, generator=rng).tolist()
    folder = study(tmp_path, rng, gains)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"scored_after": [4]}))
    for path in folder.glob("block-*.json"):
        one = json.loads(path.read_text())
        then = BEFORE | {"afgb": BEFORE["afgb"] * (1 + gains[one["block"]])}
        path.write_text(json.dumps(one | {"on the way": {"4": then}}))
    found = by_budget(folder, guarded=False)
    assert [*found] == [4] and found[4]["gains"] == pytest.approx([-gain for gain in gains])
    for name, sign in zip(ESTIMATORS[:2], (-1, 1), strict=True):
        assert found[4]["estimators"][name]["correlation"] == pytest.approx(sign)
        assert summary(folder, guarded=False)["estimators"][name]["correlation"] == pytest.approx(-sign)


def test_only_blocks_of_every_seed_are_compared():
    by_seed = {1: {0: 0.1, 1: 0.4, 2: 0.3}, 2: {0: 0.3, 2: 0.5}}
    found = compared([1.0, 9.0, 2.0], by_seed, random.Random(1))
    assert found["first"] == 2 and found["correlation"] == pytest.approx(1) and found["regret"] == pytest.approx(0)


@pytest.mark.parametrize("layers", [6, 12, 30])
def test_blocks_come_in_an_order_that_covers_all_depths(layers):
    order = order_of(layers)
    assert sorted(order) == list(range(layers))
    early = sorted(order[: layers // 3])
    assert early[0] < layers / 3 and early[-1] >= 2 * layers / 3
