"""Rewards: what a response is worth. Built-in ones by name, your own by dotted path.

A reward is a function of the responses' texts and of their rows (the prompt's line of the data file), which returns one
number for each response. In YAML:

    reward: exact_answer
    reward: {name: regex, pattern: "^Yes"}
    reward: {name: my_package.my_module.my_function, alpha: 2}
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError, build
from recipes.data.rows import Prompt
from recipes.grpo.exact_answer import ExactAnswer

__all__ = ["Reward", "RewardError", "check_rows", "get_reward", "register_reward", "reward_file", "row_keys", "score"]

Reward = Callable[[Sequence[str], Sequence[dict]], Sequence[float]]
KEY = "trainer.grpo.reward"
# What people call a reward's arguments.
RESPONSES, ROWS = ("responses", "completions", "answers", "texts"), ("rows", "prompts", "samples", "examples")
T = TypeVar("T", bound=Callable)
_REGISTRY: dict[str, Callable] = {}
# Modules that register rewards of ours, beside this one.
SHIPPED = ("recipes.grpo.reward_server",)


class RewardError(UserError):
    """A reward that failed, or gave something else than one number for each response."""


def register_reward(name: str) -> Callable[[T], T]:
    """Decorator: give a reward a name for the YAML.

    It is either a function (responses, rows, **options), or a class whose instances are rewards and whose arguments are
    the options; those of a dataclass are checked like any other configuration.
    """
    if "." in name or ":" in name:
        raise UserError(f"a reward's name has no '.' and no ':', which mark the path of a function; got {name!r}")
    if name in _REGISTRY:
        raise UserError(f"there is a reward {name!r} already; choose another name")

    def register(reward: T) -> T:
        _REGISTRY[name] = reward
        return reward

    return register


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
    if not isinstance(spec, (str, Mapping)) or not isinstance(name := _name(spec), str) or not name:
        raise ConfigError(f"{KEY} must be a name or a mapping with name and options, got {spec!r}")
    for module in SHIPPED:
        importlib.import_module(module)
    options = {} if isinstance(spec, str) else {str(k): v for k, v in spec.items() if k != "name"}
    if name in _REGISTRY:
        target = _REGISTRY[name]
    elif "." in name or ":" in name:
        target = _import(name)
    else:
        close = get_close_matches(name, _REGISTRY, n=1)
        guess = f"; did you mean {close[0]}? There" if close else "; there"
        raise ConfigError(
            f"{KEY}: unknown reward {name}{guess} are {', '.join(sorted(_REGISTRY))}, and any function by its "
            "path, package.module.function"
        )
    reward = _with_options(name, target, options)
    _check_order(name, reward)
    return _Named(name, reward)


def row_keys(reward: Reward) -> Collection[str] | None:
    """Which keys a reward reads of a row beside the prompt, if it says so in an attribute `row_keys`; None: it is handed the row
    and does not say.

    Raises:
        ConfigError: an attribute that is no list of keys.
    """
    target = reward.reward
    keys = getattr(target.func if isinstance(target, partial) else target, "row_keys", None)
    if keys is not None and (isinstance(keys, str) or not all(isinstance(key, str) for key in keys)):
        raise ConfigError(f"{KEY}: {reward.name}.row_keys={keys!r} must be a list of keys")
    return keys


def reward_file(spec: str | Mapping[str, Any]) -> Path | None:
    """Where a reward of one's own is written, once it has been got; None for ours."""
    name = _name(spec)
    module = sys.modules.get(name.rpartition(":" if ":" in name else ".")[0])
    written = None if name in _REGISTRY else getattr(module, "__file__", None)
    return Path(written) if written else None


def check_rows(reward: Reward, prompts: Sequence[Prompt], path: str) -> None:
    """Let a reward refuse rows before the run starts, if it has a method `check(row)` that raises for a bad one.

    Raises:
        RewardError: with the file and line of the first row that it refuses.
    """
    check = getattr(reward.reward, "check", None)
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
        raise RewardError(f"reward {name} failed: {_describe(error)}") from error
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


def _name(spec: str | Mapping[str, Any]) -> Any:
    return spec if isinstance(spec, str) else spec.get("name")


def _import(path: str) -> Callable:
    """The function at `package.module.function` or `package.module:function`."""
    module_name, _, attribute = path.rpartition(":" if ":" in path else ".")
    if not module_name or not attribute:
        raise ConfigError(f"{KEY}={path} is not the path of a function: write package.module.function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name}; is its folder on PYTHONPATH?"
        else:
            reason = f"importing {module_name} failed: {_describe(error)}"
        raise ConfigError(f"{KEY}={path}: {reason}") from error
    if not hasattr(module, attribute):
        close = get_close_matches(attribute, [n for n, v in vars(module).items() if callable(v)], n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{KEY}={path}: module {module_name} has no {attribute}{guess}")
    target = getattr(module, attribute)
    if not callable(target):
        raise ConfigError(f"{KEY}={path} is not a function but {type(target).__name__}")
    return target


def _with_options(name: str, target: Callable, options: dict[str, Any]) -> Reward:
    if is_dataclass(target) and isinstance(target, type):
        return build(target, options, KEY)
    is_class = isinstance(target, type)
    _check_options(name, target, options, () if is_class else (None, None))
    if not is_class:
        return partial(target, **options)
    try:
        return target(**options)
    except Exception as error:
        raise ConfigError(f"{KEY}: {name} refuses its options: {_describe(error)}") from error


def _check_order(name: str, reward: Reward) -> None:
    """Refuse a reward that takes what it is called with the other way round: some compute on without an error."""
    try:
        names = [*inspect.signature(reward).parameters][:2]
    except (TypeError, ValueError):  # written in C
        return
    if names and (names[0] in ROWS or names[-1] in RESPONSES and len(names) == 2):
        raise ConfigError(f"{KEY}: {name} takes ({', '.join(names)}), but rewards are called with (responses, rows)")


def _check_options(name: str, target: Callable, options: dict[str, Any], arguments: tuple) -> None:
    """Refuse options that `target`, called with `arguments` before them, would not take."""
    try:
        signature = inspect.signature(target)
    except ValueError:  # written in C
        return
    names = list(signature.parameters)[len(arguments) :]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key in options:
        if key not in names and not takes_any:
            close = get_close_matches(key, names, n=1)
            guess = f"did you mean {KEY}.{close[0]}?" if close else f"{name} has {', '.join(names) or 'no options'}"
            raise ConfigError(f"unknown key {KEY}.{key}; {guess}")
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        raise ConfigError(f"{KEY}: {name}: {error}; its options are {', '.join(names) or 'none'}") from error


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


def _describe(error: BaseException) -> str:
    """Kind, first line and place of an error in somebody else's code."""
    text = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    if isinstance(error, SyntaxError):  # says its place itself
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({Path(frame.filename).name}, line {frame.lineno})"


def _short(value: Any) -> str:
    return repr(value)[:60]
