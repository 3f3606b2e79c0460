"""Several rewards of a run, each with its limit in time: sums, parts, and what a call becomes that does not come back."""

from __future__ import annotations

import logging
import math
import os
import random
import subprocess
import sys

import psutil
import pytest

from recipes.cli.config import ConfigError
from recipes.rewards.registry import RewardError
from recipes.rewards.settings import RewardLimits, RewardSection
from recipes.rewards.several import Rewards, rewards_for
from tests.alive import alive, gone
from tests.harness import ROOT
from tests.unit.recipes.rewards.cases import prompts

OWN = "tests.programs.own_rewards"
LENGTH = {"name": "length", "target": 4}


@pytest.fixture
def asked():
    """Rewards that are closed again."""
    made: list[Rewards] = []

    def make(spec, limits: RewardLimits | None = None, **several) -> Rewards:
        made.append(
            rewards_for(spec, {name: RewardSection(**s) for name, s in several.items()}, None, limits or RewardLimits())
        )
        return made[-1]

    yield make
    for each in made:
        each.close()


def failed(rewards: Rewards, texts, rows=None) -> str:
    with pytest.raises(RewardError) as caught:
        rewards.score(texts, prompts(*(rows or [{}] * len(texts))))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Sums and parts


def test_one_reward_is_its_own_sum(asked):
    texts = [["".join("x" * random.randrange(12)) for _ in range(3)] for _ in range(4)]
    scores = asked(LENGTH).score(texts, prompts(*[{}] * 4))
    wanted = [[max(0.0, 1 - abs(len(t) - 4) / 4) for t in group] for group in texts]
    assert scores.totals == wanted and scores.parts == [[[x] for x in group] for group in wanted]
    assert scores.lost == [[0] * 3] * 4
    assert scores.table()[2][1] == [wanted[2][1], 0, wanted[2][1]]


def test_a_weighted_sum_of_those_that_score_the_row(asked):
    rewards = asked(
        None,
        size={"reward": f"{OWN}.plain", "weight": 0.5},
        yes={"reward": {"name": "regex", "pattern": "^y"}, "weight": -2.0, "data_sources": ["a", "b"]},
        fixed={"reward": {"name": f"{OWN}.Typed", "alpha": 3}, "data_sources": ["b"]},
    )
    rows = [{"data_source": "a"}, {"data_source": "b"}, {}]
    scores = rewards.score([["y", "nn"]] * 3, prompts(*rows))
    nan = math.nan
    assert repr(scores.parts) == repr(
        [[[1.0, 1.0, nan], [2.0, 0.0, nan]], [[1.0, 1.0, 3.0], [2.0, 0.0, 3.0]], [[1.0, nan, nan], [2.0, nan, nan]]]
    )
    assert scores.totals == [[-1.5, 1.0], [1.5, 4.0], [0.5, 1.0]]


def test_one_of_weight_0_that_is_lost_takes_nothing_away(asked):
    rewards = asked(
        None, RewardLimits(1.0, "drop"), a={"reward": f"{OWN}.slow", "weight": 0.0}, b={"reward": f"{OWN}.plain"}
    )
    scores = rewards.score([["hang", "cc"]], prompts({}))
    assert scores.totals == [[4.0, 2.0]] and scores.lost == [[1, 1]] and math.isnan(scores.parts[0][0][0])


def test_a_row_that_nothing_scores_is_refused(asked):
    rewards = asked(
        None, a={"reward": f"{OWN}.plain", "data_sources": ["x"]}, b={"reward": "exact_answer", "data_sources": ["y"]}
    )
    rewards.check_rows(prompts({"data_source": "x"}, {"data_source": "y", "answer": 1}), "rows.jsonl")
    with pytest.raises(
        RewardError, match=r"rows\.jsonl:5: no reward of trainer\.grpo\.rewards scores data_source='z': name it"
    ):
        rewards.check_rows(prompts({"data_source": "x"}, {"data_source": "z"}), "rows.jsonl")
    with pytest.raises(RewardError, match=r"rows\.jsonl:3: no answer to compare with"):
        rewards.check_rows(prompts({"data_source": "y"}), "rows.jsonl")
    assert rewards.row_keys is None
    known = asked(None, a={"reward": "exact_answer"}, b={"reward": LENGTH})
    assert known.row_keys == {"answer"} and known.files == {
        "trainer.grpo.rewards.a.reward": None, "trainer.grpo.rewards.b.reward": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reward", "several", "message"),
    [
        ("exact_answer", {"a": {"reward": LENGTH}}, "trainer.grpo.reward=exact_answer and trainer.grpo.rewards are both set"),
        (None, {}, "trainer.grpo.reward is not set"),
        (None, {"a/b": {"reward": LENGTH}}, "'a/b' names a reward in the log: use letters"),
        (None, {"a": {"reward": "lenth"}}, "trainer.grpo.rewards.a.reward: unknown reward lenth; did you mean length?"),
        (None, {"a": {"reward": {"name": "length"}}}, "missing key trainer.grpo.rewards.a.reward.target (int)"),
        (None, {"a": {"reward": {"name": "length", "target": 0}}}, "trainer.grpo.rewards.a.reward.target=0 must be"),
        (None, {"a": {"reward": LENGTH, "weight": math.inf}}, "weight=inf must be finite"),
        (None, {"a": {"reward": LENGTH, "data_sources": []}}, "data_sources=[] scores no row"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(asked, reward, several, message):
    with pytest.raises(ConfigError) as caught:
        asked(reward, **several)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"timeout": 0}, "reward_timeout=0 must be a positive number of seconds"),
        ({"timeout": math.inf}, "reward_timeout=inf must be"),
        ({"on_timeout": "ignore"}, "on_reward_timeout=ignore must be one of refuse, zero, drop"),
        ({"processes": 0}, "reward_processes=0 must be at least 1"),
    ],
)
def test_limits_that_are_none(limits, message):
    with pytest.raises(ConfigError, match=message):
        RewardLimits(**limits)


def test_an_infinite_sum_is_refused(asked):
    rewards = asked(None, a={"reward": {"name": f"{OWN}.Typed", "alpha": 1e308}, "weight": 100})
    assert "the weighted sum for the prompt of line 5 is infinite" in failed(rewards, [[], ["x"]])


# In a process


def test_rewards_run_in_a_process_of_their_own_that_is_kept(asked):
    rewards = asked(f"{OWN}.own_process")
    first = rewards.score([["a", "b"], ["c"]], prompts({}, {})).totals
    assert len({x for group in first for x in group}) == 1 and first[0][0] != os.getpid()
    assert rewards.score([["d"]], prompts({})).totals == [[first[0][0]]]
    rewards.close()
    assert not psutil.pid_exists(int(first[0][0]))


def test_what_is_wrong_with_a_reward_names_its_row(asked):
    rewards = asked(f"{OWN}.gives_nan")
    assert failed(rewards, [["a", "b"]]) == (
        f"reward {OWN}.gives_nan gave nan for response 0 to the prompt of line 3; it must be finite"
    )
    message = failed(asked({"name": f"{OWN}.scaled", "alpha": "x"}), [[], ["a"]])
    assert message.startswith(f"reward {OWN}.scaled failed for the prompt of line 5: TypeError")
    assert "own_rewards.py, line" in message
    message = failed(asked(f"{OWN}.wrong_count"), [["a", "b"]])
    assert "gave 1 values for 2 responses to the prompt of line 3; it must give one for each" in message
    assert "failed for the prompt of line 3: SystemExit: enough" in failed(asked(f"{OWN}.mortal"), [["exit"]])


def test_async_rewards(asked):
    rows = [{"answer": "a"}, {"answer": "b"}]
    assert asked(f"{OWN}.Awaited").score([["a", "b"], ["a", "b"]], prompts(*rows)).totals == [[2, 1], [1, 2]]
    assert asked(f"{OWN}.awaited").score([["a"], ["b"], ["c"]], prompts({}, {}, {})).totals == [[3], [3], [3]]


# What does not come back


@pytest.mark.parametrize("name", ["slow", "stubborn", "awaited"])
def test_one_that_hangs_ends_the_run_with_its_row(asked, name):
    rewards = asked(f"{OWN}.{name}", RewardLimits(1.0))
    message = failed(rewards, [["a", "b"], ["c", "hang"]])
    assert message == (
        f"reward {OWN}.{name} has not come back within trainer.grpo.reward_timeout=1 s for one of 2 responses to the prompt of "
        "line 5: mend it, raise trainer.grpo.reward_timeout, or set trainer.grpo.on_reward_timeout to zero or drop"
    )


@pytest.mark.parametrize("name", ["slow", "mortal", "awaited"])
def test_zero_is_for_the_response_alone_that_hangs(asked, caplog, name):
    bad = {"slow": "hang", "mortal": "die", "awaited": "hang"}[name]
    rewards = asked(f"{OWN}.{name}", RewardLimits(1.0, "zero"))
    with caplog.at_level(logging.WARNING):
        scores = rewards.score([["a", "bb"], ["ccc", bad, "dd"], [bad]], prompts({}, {}, {}))
    if name != "awaited":
        assert scores.totals == [[1, 2], [3, 0, 2], [0]]
    assert scores.lost == [[0, 0], [0, 1, 0], [1]] and all(x >= 1 for x in (*scores.totals[0], scores.totals[1][2]))
    said = (
        "ended its process (exit code 7)"
        if bad == "die"
        else "has not come back within trainer.grpo.reward_timeout=1 s"
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"reward {OWN}.{name} {said} for responses to the prompt of line {line}: they count as 0" for line in (5, 7)
    ]


def test_drop_leaves_the_group_without_a_number(asked):
    rewards = asked(None, RewardLimits(1.0, "drop"), a={"reward": f"{OWN}.slow"}, b={"reward": f"{OWN}.plain"})
    scores = rewards.score([["a", "hang"], ["b", "cc"]], prompts({}, {}))
    assert scores.lost == [[1, 1], [0, 0]] and scores.totals[1] == [2, 4]
    assert all(map(math.isnan, scores.totals[0])) and scores.parts[0][1][1] == 4 and math.isnan(scores.parts[0][1][0])


def test_coroutines_that_keep_the_others_from_coming_back_are_asked_one_by_one(asked, monkeypatch):
    monkeypatch.setattr("recipes.rewards.processes.GRACE_SECONDS", 0.2)
    scores = asked(f"{OWN}.awaited", RewardLimits(1.0, "zero")).score([["a"], ["block"], ["c"]], prompts({}, {}, {}))
    assert scores.lost == [[0], [1], [0]] and scores.totals[1] == [0] and scores.totals[0][0] >= 1


def test_a_process_that_is_killed_is_told_from_one_that_is_slow(asked):
    message = failed(asked(f"{OWN}.mortal"), [["kill"]])
    assert "ended its process (SIGKILL, is memory short?) for a response to the prompt of line 3: mend it" in message


def test_several_processes_do_not_wait_for_one_that_hangs(asked):
    rewards = asked(f"{OWN}.slow", RewardLimits(2.0, "zero", 2))
    scores = rewards.score([["hang"], ["a"], ["bb"], ["ccc"]], prompts(*[{}] * 4))
    assert scores.totals == [[0], [1], [2], [3]]


@pytest.mark.parametrize("bad", ["hang", "die"])
def test_what_a_reward_has_started_ends_with_its_process(asked, tmp_path, bad):
    file = tmp_path / "pids"
    rewards = asked(f"{OWN}.starts", RewardLimits(3.0, "drop"))  # to start something takes time, too
    scores = rewards.score([["a"], [bad], ["b"]], prompts(*[{"file": str(file)}] * 3))
    assert scores.lost == [[0], [1], [0]]
    started = [int(line) for line in file.read_text().split()]
    assert gone(*started[:2]) and alive(started[2])
    rewards.close()
    assert gone(started[2])


@pytest.mark.kills
@pytest.mark.parametrize("where", ["in Python", "in C"])
def test_no_process_is_left_when_the_run_is_killed(where):
    """While a reward hangs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.programs.hanging_reward", where], cwd=ROOT, stdout=subprocess.PIPE
    )
    scoring = psutil.Process(int(process.stdout.readline()))
    children = psutil.Process(process.pid).children(recursive=True)
    assert scoring in children
    process.kill()
    process.wait()
    assert gone(*(each.pid for each in children))
