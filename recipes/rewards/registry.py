"""Rewards: what a response is worth. Built-in ones by name, your own by dotted path.

A reward is a function of the responses' texts and of their rows (the prompt's line of the data file), which returns one
number for each response. In YAML:

    reward: exact_answer
    reward: {name: regex, pattern: "^Yes"}
    reward: {name: my_package.my_module.my_function, alpha: 2}
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError
from recipes.cli.named import Registry, describe
from recipes.rewards.exact_answer import ExactAnswer

__all__ = [
    "KEY", "NamedReward", "Reward", "RewardError", "get_reward", "is_async", "register_reward", "score", "score_async",
]  # fmt: skip

Reward = Callable[[Sequence[str], Sequence[dict]], Sequence[float] | Awaitable[Sequence[float]]]
KEY = "trainer.grpo.reward"
# What people call a reward's arguments.
RESPONSES, ROWS = ("responses", "completions", "answers", "texts"), ("rows", "prompts", "samples", "examples")
T = TypeVar("T", bound=Callable)
# Modules that register rewards of ours, beside this one.
_SHIPPED = (
    "choice",
    "client",
    "code",
    "json_schema",
    "judge",
    "math_answer",
    "model",
    "rarer",
    "reasoning_gym",
    "texts",
)
REGISTRY = Registry(KEY, "reward", "function", [f"recipes.rewards.{name}" for name in _SHIPPED])


class RewardError(UserError):
    """A reward that failed, or gave something else than one number for each response.

    Attributes:
        index: of the response, where it is one of those that were asked for.
    """

    index: int | None = None


def register_reward(name: str) -> Callable[[T], T]:
    """Decorator: give a reward a name for the YAML.

    It is either a function (responses, rows, **options), or a class whose instances are rewards and whose arguments are
    the options; those of a dataclass are checked like any other configuration.
    """
    return REGISTRY.register(name)


@dataclass(frozen=True)
class NamedReward:
    """A reward with its options.

    Attributes:
        name: for messages.
        spec: what the configuration says, of which another process makes it again.
        key: of the configuration.
    """

    name: str
    reward: Reward
    spec: str | Mapping[str, Any]
    key: str = KEY

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> Sequence[float]:
        return self.reward(responses, rows)

    @property
    def target(self) -> Any:
        """What has the attributes that a reward may have: the function without its options, or the object."""
        return self.reward.func if isinstance(self.reward, partial) else self.reward

    @property
    def bounds_itself(self) -> bool:
        """Whether it comes back in any case: it is asked without a process of its own, for all responses at once, and gives None
        for one that it could not score in time."""
        return getattr(self.target, "bounds_itself", False)

    @property
    def row_keys(self) -> Collection[str] | None:
        """Which keys it reads of a row beside the prompt, if it says so in an attribute `row_keys`; None: it is handed the row
        and does not say.

        Raises:
            ConfigError: an attribute that is no list of keys.
        """
        keys = getattr(self.target, "row_keys", None)
        if keys is not None and (isinstance(keys, str) or not all(isinstance(key, str) for key in keys)):
            raise ConfigError(f"{self.key}: {self.name}.row_keys={keys!r} must be a list of keys")
        return keys

    def check_here(self) -> None:
        """Let it refuse this machine, if it has a method `check_here`.

        Raises:
            ConfigError: something that it needs is not here.
        """
        if hasattr(self.target, "check_here"):
            self.target.check_here()

    @property
    def file(self) -> Path | None:
        """Where one of one's own is written; None for ours."""
        return REGISTRY.file(self.spec)


def get_reward(spec: str | Mapping[str, Any], key: str = KEY) -> NamedReward:
    """The reward that the configuration asks for.

    Args:
        spec: a name, `package.module.function` or `package.module:function`; or a mapping of `name` and options.
        key: where the configuration does so.

    Raises:
        ConfigError: an unknown name, a module that does not import, wrong options.
    """
    try:
        name, target, options = REGISTRY.find(spec)
        reward = REGISTRY.with_options(name, target, options)
        _check_order(name, reward)
    except ConfigError as error:
        raise ConfigError(str(error).replace(KEY, key)) from error
    return NamedReward(name, reward, spec, key)


def is_async(reward: Reward) -> bool:
    """Whether it must be awaited."""
    target = reward.reward if isinstance(reward, NamedReward) else reward
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None))  # noqa: B004


def score(
    reward: Reward, responses: Sequence[str], rows: Sequence[dict], origins: Sequence[str] | None = None
) -> list[float | None]:
    """One finite number for each response; None where a reward that bounds itself could not tell in time.

    Args:
        origins: of each row, file and line, for messages.

    Raises:
        RewardError: the reward raised, or gave a wrong count, something else than a number, NaN or infinity.
    """
    with _reported(reward, origins):
        values = reward(responses, rows)
        if inspect.isawaitable(values):
            values = asyncio.run(_awaited(values))
    return _numbers(reward, values, responses, origins)


async def score_async(
    reward: Reward, responses: Sequence[str], rows: Sequence[dict], origins: Sequence[str] | None = None
) -> list[float | None]:
    """The same for one that `is_async`."""
    with _reported(reward, origins):
        values = await reward(responses, rows)
    return _numbers(reward, values, responses, origins)


async def _awaited(values: Awaitable[Sequence[float]]) -> Sequence[float]:
    return await values


@contextlib.contextmanager
def _reported(reward: Reward, origins: Sequence[str] | None) -> Iterator[None]:
    """Whatever it raises, as a RewardError with its name and, where all that it was asked is of one row, that."""
    of_row = f" for the prompt of {origins[0]}" if origins and len({*origins}) == 1 else ""
    try:
        yield
    except UserError as error:
        index = getattr(error, "index", None)
        if origins and not of_row and index is not None:
            of_row = f" for the prompt of {origins[index]}"
        raise RewardError(f"reward {_name(reward)}{of_row}: {error}") from error
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {_name(reward)} failed{of_row}: {describe(error)}") from error


def _numbers(
    reward: Reward, values: Any, responses: Sequence[str], origins: Sequence[str] | None
) -> list[float | None]:
    name = _name(reward)
    if not isinstance(values, Iterable) or isinstance(values, (str, Mapping, Set)):
        raise RewardError(f"reward {name} gave {_short(values)}; it must give a list of numbers, one for each response")
    with _reported(reward, origins):
        values = list(values.tolist() if hasattr(values, "tolist") else values)  # a tensor, an array or a generator
    if len(values) != len(responses):
        of_row = f" to the prompt of {origins[0]}" if origins and len({*origins}) == 1 else ""
        raise RewardError(
            f"reward {name} gave {len(values)} values for {len(responses)} responses{of_row}; it must give one for each"
        )
    places = [f"response {i}" for i in range(len(values))]
    if origins is not None:
        places = [f"{place} to the prompt of {origin}" for place, origin in zip(places, origins, strict=True)]
    may_lack = isinstance(reward, NamedReward) and reward.bounds_itself
    pairs = zip(values, places, strict=True)
    return [None if value is None and may_lack else _number(value, place, name) for value, place in pairs]


def _name(reward: Reward) -> str:
    return getattr(reward, "name", None) or getattr(reward, "__qualname__", type(reward).__name__)


register_reward("exact_answer")(ExactAnswer)


def _check_order(name: str, reward: Reward) -> None:
    """Refuse a reward that takes what it is called with the other way round: some compute on without an error."""
    try:
        names = [*inspect.signature(reward).parameters][:2]
    except (TypeError, ValueError):  # written in C
        return
    if names and (names[0] in ROWS or names[-1] in RESPONSES and len(names) == 2):
        raise ConfigError(f"{KEY}: {name} takes ({', '.join(names)}), but rewards are called with (responses, rows)")


def _number(value: Any, place: str, name: str) -> float:
    if hasattr(value, "item"):  # a tensor or NumPy scalar
        with contextlib.suppress(RuntimeError, ValueError):  # more than one element
            value = value.item()
    if not isinstance(value, Real):
        raise RewardError(f"reward {name} gave {_short(value)} for {place}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"reward {name} gave {number} for {place}; it must be finite")
    return number


def _short(value: Any) -> str:
    return repr(value)[:60]
