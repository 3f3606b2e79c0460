"""A guessing game of several turns: a number is to be found by hearing whether it is higher or lower."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from recipes.cli.config import ConfigError
from recipes.environments.environment import End, Environment, Messages, Observation, Talk
from recipes.environments.registry import KEY, register_environment

__all__ = ["GuessNumber", "answer", "question"]


def question(highest: int) -> str:
    """What the model is asked."""
    return f"Guess my number, from 1 to {highest}."


def answer(guess: int | None, secret: int) -> str:
    """What it hears of a guess that was wrong; None: of a turn without a number."""
    return "A number, please." if guess is None else f"{'Higher' if guess < secret else 'Lower'} than {guess}."


@register_environment("guess_number")
@dataclass
class GuessNumber(Environment):
    """Rows `{"secret": 5, "highest": 16}`. The reward is 1 for a number that was found, less `haste` for each guess before.

    Attributes:
        turns: guesses that there are.
        haste: 0: it does not matter when it is found.
    """

    row_keys: ClassVar = ("secret", "highest")
    gives_reward: ClassVar = True
    bounds_itself: ClassVar = True

    turns: int = 4
    haste: float = 0.0

    def __post_init__(self):
        if self.turns < 1:
            raise ConfigError(f"{KEY}.turns={self.turns} must be at least 1")
        if not 0 <= self.haste * (self.turns - 1) <= 1:
            raise ConfigError(f"{KEY}.haste={self.haste} must be 0 to 1 over the guesses but one, {self.turns - 1}")

    def start(self, row: Mapping[str, Any]) -> Messages:
        secret, highest = row.get("secret"), row.get("highest")
        if type(secret) is not int or type(highest) is not int or not 1 <= secret <= highest:
            raise ValueError(f"secret={secret!r} must be a whole number from 1 to highest={highest!r}")
        return [{"role": "user", "content": question(highest)}]

    def step(self, talk: Talk) -> Observation | End:
        secret, before = talk.row["secret"], len(talk.turns) - 1
        found = re.search(r"\d{1,9}", talk.said.rpartition("</think>")[2])
        guess = int(found[0]) if found else None
        if guess == secret:
            return End(1.0 - self.haste * before)
        if before + 1 >= self.turns:
            return End(0.0)
        return Observation([{"role": "user", "content": answer(guess, secret)}])
