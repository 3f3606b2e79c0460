"""Rewards: what a response is worth. Built-in ones by name, your own by dotted path.

A reward is a function of the responses' texts and of their rows (the prompt's line of the data file), which returns one
number for each response. In YAML:

    reward: exact_answer
    reward: {name: regex, pattern: "^Yes"}
    reward: {name: my_package.my_module.my_function, alpha: 2}
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError
from recipes.cli.named import Registry, describe
from recipes.data.rows import Prompt
from recipes.environments.registry import Named
from recipes.rewards.exact_answer import ExactAnswer

__all__ = [
    "Reward", "RewardError", "check_rows", "get_reward", "register_reward", "reward_file", "reward_for", "row_keys", "score",
]  # fmt: skip

Reward = Callable[[Sequence[str], Sequence[dict]], Sequence[float]]
KEY = "trainer.grpo.reward"
# What people call a reward's arguments.
RESPONSES, ROWS = ("responses", "completions", "answers", "texts"), ("rows", "prompts", "samples", "examples")
T = TypeVar("T", bound=Callable)
# Modules that register rewards of ours, beside this one.
REGISTRY = Registry(KEY, "reward", "function", ("recipes.rewards.server", "recipes.rewards.reasoning_gym"))


class RewardError(UserError):
    """A reward that failed, or gave something else than one number for each response."""


def register_reward(name: str) -> Callable[[T], T]:
    """Decorator: give a reward a name for the YAML.

    It is either a function (responses, rows, **options), or a class whose instances are rewards and whose arguments are
    the options; those of a dataclass are checked like any other configuration.
    """
    return REGISTRY.register(name)


@dataclass(frozen=True)
class _Named:
    """A reward with its options, and its name for messages."""

    name: str
    reward: Reward

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> Sequence[float]:
        return self.reward(responses, rows)


def get_reward(spec: str | Mapping[str, Any]) -> Reward:
    """The reward that the configuration asks for.

    Args:
        spec: a name, `package.module.function` or `package.module:function`; or a mapping of `name` and options.

    Raises:
        ConfigError: an unknown name, a module that does not import, wrong options.
    """
    name, target, options = REGISTRY.find(spec)
    reward = REGISTRY.with_options(name, target, options)
    _check_order(name, reward)
    return _Named(name, reward)


def reward_for(spec: str | Mapping[str, Any] | None, environment: Named | None) -> Reward | None:
    """The reward beside an environment; None where that gives it.

    Raises:
        ConfigError: both give one, or none does; or as `get_reward`.
    """
    gives = environment is not None and environment.kind.gives_reward
    if gives and spec is not None:
        raise ConfigError(
            f"{KEY}={spec}, and trainer.grpo.environment={environment.name} gives rewards itself: set {KEY}=null"
        )
    if not gives and spec is None:
        among = ", ".join(REGISTRY.names)
        raise ConfigError(f"{KEY} is not set: name what scores responses, {among} or the path of a function of yours")
    return None if spec is None else get_reward(spec)


def row_keys(reward: Reward | None) -> Collection[str] | None:
    """Which keys a reward reads of a row beside the prompt, if it says so in an attribute `row_keys`; None: it is handed the row
    and does not say.

    Raises:
        ConfigError: an attribute that is no list of keys.
    """
    if reward is None:
        return ()
    target = reward.reward
    keys = getattr(target.func if isinstance(target, partial) else target, "row_keys", None)
    if keys is not None and (isinstance(keys, str) or not all(isinstance(key, str) for key in keys)):
        raise ConfigError(f"{KEY}: {reward.name}.row_keys={keys!r} must be a list of keys")
    return keys


def reward_file(spec: str | Mapping[str, Any] | None) -> Path | None:
    """Where a reward of one's own is written, once it has been got; None for ours, and for none."""
    return None if spec is None else REGISTRY.file(spec)


def check_rows(reward: Reward | None, prompts: Sequence[Prompt], path: str) -> None:
    """Let a reward refuse rows before the run starts, if it has a method `check(row)` that raises for a bad one.

    Raises:
        RewardError: with the file and line of the first row that it refuses.
    """
    check = None if reward is None else getattr(reward.reward, "check", None)
    for prompt in prompts if check else ():
        try:
            check(prompt.row)
        except ValueError as error:
            raise RewardError(f"{path}:{prompt.line}: {error}") from error


def score(reward: Reward, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """One finite number for each response.

    Raises:
        RewardError: the reward raised, or gave a wrong count, something else than a number, NaN or infinity.
    """
    assert len(responses) == len(rows), (len(responses), len(rows))
    name = getattr(reward, "name", None) or getattr(reward, "__qualname__", type(reward).__name__)
    try:
        values = reward(responses, rows)
        if not isinstance(values, Iterable) or isinstance(values, (str, Mapping, Set)):
            raise RewardError(f"gave {_short(values)}; it must give a list of numbers, one for each response")
        values = list(values.tolist() if hasattr(values, "tolist") else values)  # a tensor or array
    except UserError as error:
        raise RewardError(f"reward {name}: {error}") from error
    except Exception as error:
        raise RewardError(f"reward {name} failed: {describe(error)}") from error
    if len(values) != len(responses):
        raise RewardError(
            f"reward {name} gave {len(values)} values for {len(responses)} responses; it must give one for each"
        )
    return [_number(value, i, name) for i, value in enumerate(values)]


register_reward("exact_answer")(ExactAnswer)


@register_reward("regex")
@dataclass(frozen=True)
class Regex:
    """1 where `pattern` is found in the response (re.search), else 0."""

    row_keys: ClassVar = ()

    pattern: str

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"{KEY}.pattern={self.pattern!r} is not a regular expression: {error}") from error

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        return [float(re.search(self.pattern, r) is not None) for r in responses]


@register_reward("length")
@dataclass(frozen=True)
class Length:
    """1 for a response of `target` characters or words, falling linearly to 0 for one empty or twice as long."""

    row_keys: ClassVar = ()

    target: int
    unit: str = "characters"

    def __post_init__(self):
        if self.target < 1:
            raise ConfigError(f"{KEY}.target={self.target} must be at least 1")
        if self.unit not in ("characters", "words"):
            raise ConfigError(f"{KEY}.unit must be characters or words, got {self.unit!r}")

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        lengths = [len(r if self.unit == "characters" else r.split()) for r in responses]
        return [max(0.0, 1 - abs(n - self.target) / self.target) for n in lengths]


def _check_order(name: str, reward: Reward) -> None:
    """Refuse a reward that takes what it is called with the other way round: some compute on without an error."""
    try:
        names = [*inspect.signature(reward).parameters][:2]
    except (TypeError, ValueError):  # written in C
        return
    if names and (names[0] in ROWS or names[-1] in RESPONSES and len(names) == 2):
        raise ConfigError(f"{KEY}: {name} takes ({', '.join(names)}), but rewards are called with (responses, rows)")


def _number(value: Any, index: int, name: str) -> float:
    if hasattr(value, "item"):  # a tensor or NumPy scalar
        try:
            value = value.item()
        except (RuntimeError, ValueError):  # more than one element
            pass
    if not isinstance(value, Real):
        raise RewardError(f"reward {name} gave {_short(value)} for response {index}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"reward {name} gave {number} for response {index}; it must be finite")
    return number


def _short(value: Any) -> str:
    return repr(value)[:60]
