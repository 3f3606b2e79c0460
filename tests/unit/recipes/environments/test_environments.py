"""The environments that come with the project, and those of one's own."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from recipes.cli.config import ConfigError
from recipes.environments.calculator import Calculator, calculate
from recipes.environments.environment import End, Environment, Observation, Talk, ToolCall, Turn
from recipes.environments.guess_number import GuessNumber
from recipes.environments.registry import get_environment
from recipes.rewards.settings import RewardSection
from recipes.rewards.several import rewards_for


class Mine(Environment):
    def __init__(self, size: list[int]):
        self.size = size


class Letters(Environment):
    row_keys = "number"


def draw_expression(rng, depth: int) -> tuple[str, Fraction]:
    """Text and value, worked out beside it."""
    kind = int(torch.randint(6, (), generator=rng)) if depth else 0
    if kind == 0:
        number = int(torch.randint(-50, 50, (), generator=rng))
        return str(number), Fraction(number)
    (a, x), (b, y) = draw_expression(rng, depth - 1), draw_expression(rng, depth - 1)
    if kind == 4 and y:
        return f"({a}) / ({b})", x / y
    if kind == 5:
        return f"({a}) ^ 2", x**2
    sign, value = [("+", x + y), ("-", x - y), ("*", x * y)][kind % 3]
    return f"({a}) {sign} ({b})", value


def test_the_calculator_is_exact(rng):
    for _ in range(60):
        text, value = draw_expression(rng, 3)
        assert calculate(text) == (str(value) if value.denominator == 1 else f"{float(value):.12g}"), text
    assert calculate("0.1 + 0.2") == "0.3" and calculate("7 // 2 + 7 % 4 − 2×3") == "0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / (2 - 2)", "division by zero"),
        ("__import__('os')", "only numbers"),
        ("a + 1", "only numbers"),
        ("1 +", "no arithmetic expression"),
        ("9**9**9", "too large|at most 1000"),
        ("2**0.5", "exponents are whole numbers"),
        ("(" * 150 + "1" + ")" * 150, "longer than 200"),
        ("(" * 99 + "1" + ")" * 99, "no arithmetic|^$"),
        ("1e999", "only numbers"),
        ("0 ** -1", "division by zero"),
        ("2if 3else 4", "only numbers"),
        ("9" * 150, "too large"),
    ],
)
def test_the_calculator_refuses(text, message):
    try:
        assert calculate(text) == "1"
    except ValueError as error:
        assert error.args[0] and __import__("re").search(message, error.args[0])


def test_the_calculator_answers_calls_and_then_ends():
    calculator = Calculator()
    calls = (
        ToolCall("calculator", {"expression": "6 * 7"}, "a"), ToolCall("calculator", {"x": 1}, "b"), ToolCall("search", {}, "c"),
        ToolCall("", {}, "d", "no JSON"), ToolCall("calculator", {"expression": "1 / 0"}, "e"),
    )  # fmt: skip
    step = calculator.step(Talk({}, (Turn("", calls),)))
    assert isinstance(step, Observation) and [m["tool_call_id"] for m in step.answer] == list("abcde")
    assert [m["content"].split(":")[0] for m in step.answer] == ["42", "error", "error", "error", "error"]
    assert {m["role"] for m in step.answer} == {"tool"} and step.reward == 0
    assert calculator.step(Talk({}, (Turn("so 42"),))) == End(None)


def test_a_guess_is_answered_until_it_is_right_or_the_last(rng):
    highest = 3 + int(torch.randint(30, (), generator=rng))
    secret = 2 + int(torch.randint(highest - 2, (), generator=rng))
    game, row = GuessNumber(turns=3, haste=0.25), {"secret": secret, "highest": highest}
    assert game.start(row)[0]["content"] == f"Guess my number, from 1 to {highest}."
    turns: tuple[Turn, ...] = ()
    for said, hint in (("1?", "Higher than 1."), ("none", "A number, please.")):
        turns += (Turn(said),)
        assert game.step(Talk(row, turns)) == Observation([{"role": "user", "content": hint}])
    assert game.step(Talk(row, (*turns, Turn(f"it is {secret}")))) == End(0.5)
    assert game.step(Talk(row, (*turns, Turn(f"{secret + 1}")))) == End(0.0)
    assert game.step(Talk(row, (Turn(f"{secret + 1}"),))).answer[0]["content"] == f"Lower than {secret + 1}."
    assert game.step(Talk(row, (Turn(str(secret)),))) == End(1.0)
    assert game.step(Talk(row, (Turn(f"<think>1 to {highest}</think>{secret}"),))) == End(1.0)
    with pytest.raises(ValueError, match=r"secret=0 must be a whole number from 1 to highest=5"):
        game.start({"secret": 0, "highest": 5})


def test_names_paths_and_options():
    assert get_environment("single_turn") is None
    named = get_environment({"name": "guess_number", "turns": 2})
    assert named.make().turns == 2 and named.make() is not named.make()
    mine = get_environment({"name": f"{__name__}.Mine", "size": [5]})
    assert mine.make().size == [5] and mine.make().size is not mine.make().size
    for spec, message in (
        ("guess_numbr", "did you mean guess_number?"),
        ({"name": "guess_number", "turn": 2}, "turn"),
        ({"name": "guess_number", "turns": 0}, "turns=0 must be at least 1"),
        (f"{__name__}.Mine", "size"),
        (f"{__name__}:draw_expression", "is no subclass of"),
        (f"{__name__}.Letters", "row_keys='number' must be a list of keys"),
        (3, "must be a name or a mapping"),
    ):
        with pytest.raises(ConfigError, match=message):
            get_environment(spec)


def test_one_of_both_gives_rewards():
    game, tool = get_environment("guess_number"), get_environment("calculator")
    assert (
        not rewards_for(None, {}, game).parts and rewards_for("exact_answer", {}, tool).parts[0].name == "exact_answer"
    )
    with pytest.raises(ConfigError, match="gives rewards itself: set trainer.grpo.reward=null"):
        rewards_for("exact_answer", {}, game)
    with pytest.raises(
        ConfigError, match=r"rewards=\{a\}, and .*guess_number gives rewards itself: set trainer.grpo.rewards=\{\}"
    ):
        rewards_for(None, {"a": RewardSection("exact_answer")}, game)
    for environment in (tool, None):
        with pytest.raises(ConfigError, match="trainer.grpo.reward is not set"):
            rewards_for(None, {}, environment)
