"""Rewards: the built-in ones on hand-made cases, dotted paths, and everything that can go wrong with user code."""

import pytest

from recipes.rewards import RewardError, get_reward, register_reward, score


def run(spec, responses, **row):
    return score(get_reward(spec), responses, [row] * len(responses))


def test_exact_answer():
    responses = [" 2 + 3 = 5 #### 5", "#### 05.0", "Answer: 5", "5", "#### 6", "five", "#### 5 #### 6", ""]
    assert run("exact_answer", responses, answer="5") == [1, 1, 1, 1, 0, 0, 0, 0]
    assert run("exact_answer", ["#### Paris", "paris"], answer="Paris") == [1, 0]
    assert run("exact_answer", ["1,234"], answer=1234) == [1]


def test_regex_and_length():
    assert run({"name": "regex", "pattern": r"^\d+$"}, ["12", "a1"]) == [1, 0]
    assert run({"name": "length", "target": 4}, ["abcd", "ab", "", "abcdefgh"]) == [1, 0.5, 0, 0]
    assert run({"name": "length", "target": 2, "unit": "words"}, ["a b", "a"]) == [1, 0.5]


def test_dotted_paths_and_options(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def f(responses, rows, alpha=1):\n    return [alpha * r['x'] for r in rows]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run("own_rewards.f", ["a", "b"], x=2) == [2, 2]
    assert run({"name": "own_rewards:f", "alpha": 3}, ["a"], x=2) == [6]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("exact_anser", "did you mean exact_answer?"),
        ("no_such_module_at_all.f", "cannot be imported"),
        ("math.pi", "not a function"),
        ("math.no_such", "cannot be imported"),
        ({"pattern": "x"}, "key name"),
        ({"name": "regex"}, "pattern"),
        ({"name": "regex", "pattern": "("}, "bad pattern"),
        ({"name": "length", "target": 0}, "must be positive"),
    ],
)
def test_bad_specs(spec, words):
    with pytest.raises(RewardError, match=words.replace("?", r"\?")) as caught:
        get_reward(spec)
    assert "\n" not in str(caught.value)


def _raises(responses, rows):
    raise KeyError("colour\nand more")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (_raises, "_raises raised KeyError"),
        (lambda r, rows: [1.0], "returned 1 values for 2 responses"),
        (lambda r, rows: [1.0, float("nan")], "returned nan for response 1"),
        (lambda r, rows: [float("inf"), 1], "returned inf for response 0"),
        (lambda r, rows: [1, "high"], "returned 'high' for response 1, not a number"),
    ],
)
def test_rewards_that_break(reward, words):
    with pytest.raises(RewardError) as caught:
        score(reward, ["a", "b"], [{}, {}])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_without_answer():
    with pytest.raises(RewardError, match="'answer'"):
        run("exact_answer", ["5"], question="x")


def test_registering_a_reward():
    @register_reward("always_two")
    def make():
        return lambda responses, rows: [2] * len(responses)

    assert run("always_two", ["a"]) == [2.0]
