"""Rewards: the built-in ones, your own, and how a bad one is reported."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import recipes.rewards.server  # noqa: F401  registers http
from recipes.cli.config import ConfigError
from recipes.data.rows import Prompt
from recipes.rewards.registry import RewardError, get_reward, register_reward, score
from recipes.rewards.several import rewards_for

numbers = itertools.count()


def refused(spec) -> str:
    with pytest.raises(ConfigError) as caught:
        get_reward(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def failed(reward, responses=("a", "b"), rows=None) -> str:
    with pytest.raises(RewardError) as caught:
        score(reward, responses, rows or [{}] * len(responses))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write an importable module; gives its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"my_rewards_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


# Built in


def test_rows_that_a_reward_asks_nothing_of():
    rewards_for({"name": "length", "target": 3}, {}).check_rows([Prompt((1,), {"prompt": "x"}, 1)], "data.jsonl")


def test_a_reward_says_which_keys_it_reads(module):
    """The built-in ones do, and yours may; one that does not is handed the row whole."""
    assert list(get_reward("exact_answer").row_keys) == ["answer"]
    assert list(get_reward({"name": "regex", "pattern": "x"}).row_keys) == []
    assert list(get_reward({"name": "length", "target": 3}).row_keys) == []
    assert get_reward({"name": "http", "url": "http://localhost:1"}).row_keys is None
    name = module(
        "def silent(responses, rows):\n    return [0.0] * len(rows)\n"
        "def says(responses, rows, alpha=1):\n    return [0.0] * len(rows)\n"
        "says.row_keys = ['tests']\n"
        "def wrong(responses, rows):\n    return [0.0] * len(rows)\n"
        "wrong.row_keys = 'tests'\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Keyword:\n    key: str = 'keyword'\n"
        "    @property\n    def row_keys(self):\n        return [self.key]\n"
        "    def __call__(self, responses, rows):\n        return [0.0] * len(rows)\n"
    )
    assert get_reward(f"{name}.silent").row_keys is None
    assert get_reward({"name": f"{name}.says", "alpha": 2}).row_keys == ["tests"]
    assert get_reward({"name": f"{name}.Keyword", "key": "must_say"}).row_keys == ["must_say"]
    with pytest.raises(ConfigError, match=r"wrong\.row_keys='tests' must be a list of keys"):
        get_reward(f"{name}.wrong").row_keys  # noqa: B018


def test_regex():
    reward = get_reward({"name": "regex", "pattern": r"^Yes\b"})
    assert score(reward, ["Yes, it is", "Yesterday", "No. Yes"], [{}] * 3) == [1, 0, 0]
    assert "pattern" in refused({"name": "regex", "pattern": "(["})
    assert "missing key trainer.grpo.reward.pattern (str)" in refused("regex")
    assert "did you mean trainer.grpo.reward.pattern?" in refused({"name": "regex", "patern": "x"})


def test_length_falls_linearly():
    reward = get_reward({"name": "length", "target": 4})
    assert score(reward, ["", "ab", "abcd", "abcdef", "abcdefgh", "a" * 50], [{}] * 6) == [0, 0.5, 1, 0.5, 0, 0]
    words = get_reward({"name": "length", "target": 2, "unit": "words"})
    assert score(words, ["one", "one two", "one  two three"], [{}] * 3) == [0.5, 1, 0.5]
    assert "target=0" in refused({"name": "length", "target": 0})
    assert "lines" in refused({"name": "length", "target": 2, "unit": "lines"})
    assert "target must be int" in refused({"name": "length", "target": "long"})


# Your own


OWN = "tests.programs.own_rewards"


def test_functions_and_classes_by_path():
    for path in (f"{OWN}.plain", f"{OWN}:plain"):
        assert score(get_reward(path), ["a", "bcd"], [{}] * 2) == [1, 3]
    assert score(get_reward({"name": f"{OWN}.scaled", "alpha": 2, "beta": 1}), ["a", "bcd"], [{}] * 2) == [3, 7]
    assert score(get_reward({"name": f"{OWN}.Typed", "alpha": 2}), ["a"], [{}]) == [2]
    assert score(get_reward({"name": f"{OWN}.Untyped", "alpha": 2}), ["a"], [{}]) == [1]


def test_bad_options_are_found_at_set_up():
    message = refused({"name": f"{OWN}.scaled", "alpah": 2})
    assert message == "unknown key trainer.grpo.reward.alpah; did you mean trainer.grpo.reward.alpha?"
    message = refused(f"{OWN}.scaled")
    assert "'alpha'" in message and "its options are alpha, beta" in message
    assert "has no options" in refused({"name": f"{OWN}.plain", "alpha": 1})
    assert "has alpha, beta" in refused({"name": f"{OWN}.scaled", "alpha": 1, "zzz": 2})
    assert "alpha must be float" in refused({"name": f"{OWN}.Typed", "alpha": "x"})
    assert "alpha" in refused(f"{OWN}.Untyped")
    assert "TypeError" in refused({"name": f"{OWN}.Untyped", "alpha": "x"})


def test_arguments_the_other_way_round_are_refused(module):
    """`len` of rows is a number, too."""
    name = module(
        "def rows_first(rows, responses): return [len(r) for r in responses]\n"
        "def of_elsewhere(prompts, completions, **more): return [1.0 for _ in completions]\n"
        "class Called:\n    def __call__(self, samples, answers): return [1.0 for _ in answers]\n"
        "def named_otherwise(texts, data): return [len(t) for t in texts]\n"
        "def alone(responses, *rest): return [len(r) for r in responses]\n"
    )
    for function, names in (
        ("rows_first", "rows, responses"),
        ("of_elsewhere", "prompts, completions"),
        ("Called", "samples, answers"),
    ):
        words = f"{name}.{function} takes ({names}), but rewards are called with (responses, rows)"
        assert words in refused(f"{name}.{function}")
    for function in ("named_otherwise", "alone"):
        assert score(get_reward(f"{name}.{function}"), ["abc"], [{}]) == [3]


def test_bad_paths(module):
    assert "there is no module no_such_package" in refused("no_such_package.rewards.mine")
    assert "PYTHONPATH" in refused("no_such_package:mine")
    assert "did you mean scaled?" in refused(f"{OWN}.scalde")
    assert "not a function" in refused(f"{OWN}.constant")
    assert "package.module.function" in refused(".mine")
    broken = module("x = 1\nimport no_such_dependency\n")
    message = refused(f"{broken}.mine")
    assert "importing" in message and "no_such_dependency" in message and f"{broken}.py, line 2" in message
    assert "SyntaxError" in refused(f"{module('def broken(:')}.mine")


def test_unknown_names_list_the_known_ones():
    message = refused("exact_anser")
    assert "did you mean exact_answer?" in message
    names = "choice, code, exact_answer, format, http, json_schema, judge, length, math, model, reasoning_gym, regex"
    assert "package.module.function" in message and all(name in message for name in names.split(", "))
    assert "qqqq" in refused("qqqq")


@pytest.mark.parametrize("spec", [None, 3, {}, {"pattern": "x"}, {"name": 3}, "", ["exact_answer"]])
def test_specs_that_name_nothing(spec):
    assert "trainer.grpo.reward must be a name" in refused(spec)


def test_registered_rewards():
    name = f"registered_{next(numbers)}"

    @register_reward(name)
    def reward(responses, rows, bonus=0):
        return [row["value"] + bonus for row in rows]

    assert score(get_reward({"name": name, "bonus": 1}), ["a"], [{"value": 2}]) == [3]
    assert score(reward, ["a"], [{"value": 2}]) == [2]
    with pytest.raises(ValueError, match="already"):
        register_reward(name)
    with pytest.raises(ValueError, match="path"):
        register_reward("my.name")


# score


@pytest.mark.parametrize(
    "values",
    [[1, 0.5], (True, False), np.array([1.0, 0.0]), torch.tensor([1, 0]), [np.float32(1), torch.tensor(0.5)],
     (x for x in (1, 2))],
)  # fmt: skip
def test_score_takes_any_kind_of_numbers(values):
    result = score(lambda responses, rows: values, ["a", "b"], [{}, {}])
    assert len(result) == 2 and all(type(v) is float for v in result) and result[0] == 1.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], ["1 values", "2 responses"]),
        ([], ["0 values"]),
        ([1.0, float("nan")], ["nan", "response 1"]),
        ([float("inf"), 1.0], ["inf", "response 0"]),
        ([1.0, 10**400], ["inf", "response 1"]),
        (torch.tensor([0.0, float("-inf")]), ["-inf", "response 1"]),
        ([1.0, None], ["None", "response 1", "not a number"]),
        ([1.0, "0.5"], ["'0.5'", "response 1", "not a number"]),
        (torch.zeros(2, 2), ["[0.0, 0.0]", "response 0", "not a number"]),
        ([torch.zeros(2), 1], ["response 0", "not a number"]),
        (None, ["None", "list of numbers"]),
        (1.0, ["1.0", "list of numbers"]),
        ({"a": 1, "b": 2}, ["list of numbers"]),
        ("ab", ["list of numbers"]),
        (torch.tensor(1.0), ["not"]),
    ],
)
def test_score_refuses(values, words):
    def my_reward(responses, rows):
        return values

    message = failed(my_reward)
    for word in ("my_reward", *words):
        assert word in message, message


def test_an_exception_says_reward_kind_line_and_place(module):
    name = module('def raises(responses, rows):\n    raise KeyError("colour")\n\ndef long(responses, rows):\n    raise '
                  'RuntimeError("first\\nsecond")\n')  # fmt: skip
    message = failed(get_reward(f"{name}.raises"))
    assert f"{name}.raises" in message and "KeyError: 'colour'" in message and f"{name}.py, line 2" in message
    message = failed(get_reward(f"{name}.long"))
    assert "first" in message and "second" not in message
