"""Rewards by name or dotted path.

A reward is a function `(responses, rows) -> numbers`, one per response; `rows[i]` is the JSONL row of the prompt that
response i answers.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

__all__ = ["Reward", "RewardError", "get_reward", "register_reward", "score"]

Reward = Callable[[Sequence[str], Sequence[dict]], Sequence[float]]
REGISTRY: dict[str, Callable[..., Reward]] = {}


class RewardError(ValueError):
    """A reward that cannot be found, or that broke while it ran."""


def register_reward(name: str):
    """Register a maker: called with the options of the YAML, it returns the reward."""

    def decorator(maker: Callable[..., Reward]) -> Callable[..., Reward]:
        REGISTRY[name] = maker
        return maker

    return decorator


def get_reward(spec: str | Mapping[str, Any]) -> Reward:
    """Find a reward.

    Args:
        spec: `name`, or `{name: name, option: value, ...}`, where name is registered or the dotted path of a function
            (`package.module.function`), which then gets the options as keyword arguments.

    Raises:
        RewardError: no such reward, or options it does not take.
    """
    name, options = (
        (spec, {}) if isinstance(spec, str) else (spec.get("name"), {k: v for k, v in spec.items() if k != "name"})
    )
    if not isinstance(name, str):
        raise RewardError(f"trainer.grpo.reward={spec!r} must be a name or a section with the key name")
    if name in REGISTRY:
        try:
            reward = REGISTRY[name](**options)
        except TypeError as error:
            raise RewardError(f"trainer.grpo.reward {name}: {error}") from None
    else:
        function = _import(name)
        reward = partial(function, **options) if options else function
    return _Named(name, reward)


class _Named:
    """A reward that remembers what it is called, for messages."""

    def __init__(self, name: str, reward: Reward):
        self.name, self.reward = name, reward

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> Sequence[float]:
        return self.reward(responses, rows)


def _import(path: str) -> Reward:
    module, _, attribute = path.replace(":", ".").rpartition(".")
    if not module:
        nearest = difflib.get_close_matches(path, REGISTRY, n=1, cutoff=0.0)
        raise RewardError(
            f"unknown reward {path!r}; did you mean {nearest[0]}? Known: {', '.join(sorted(REGISTRY))}, or a dotted path"
        )
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"reward {path!r} cannot be imported: {error}") from None
    if not callable(function):
        raise RewardError(f"reward {path!r} is a {type(function).__name__}, not a function")
    return function


def score(reward: Reward, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """Run a reward and check what it returns.

    Raises:
        RewardError: it raised, returned the wrong number of values, or something that is no finite number.
    """
    name = getattr(reward, "name", getattr(reward, "__name__", "reward"))
    try:
        values = list(reward(responses, rows))
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward {name} raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if len(values) != len(responses):
        raise RewardError(f"reward {name} returned {len(values)} values for {len(responses)} responses")
    checked = []
    for index, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise RewardError(f"reward {name} returned {value!r} for response {index}, not a number") from None
        if not math.isfinite(number):
            raise RewardError(f"reward {name} returned {number} for response {index} ({responses[index][:60]!r})")
        checked.append(number)
    return checked


@register_reward("exact_answer")
def _exact_answer(markers: Sequence[str] = ("####", "Answer:")) -> Reward:
    """1 where the answer behind the last marker (or the whole response) equals the row's `answer`, else 0."""

    def extract(response: str) -> str:
        for marker in markers:
            if marker in response:
                return response.rsplit(marker, 1)[1].strip()
        return response.strip()

    def reward(responses, rows):
        missing = next((i for i, row in enumerate(rows) if "answer" not in row), None)
        if missing is not None:
            raise RewardError(
                f"reward exact_answer needs the key 'answer' in every row; row has {sorted(rows[missing])}"
            )
        return [float(_equal(extract(r), str(row["answer"]).strip())) for r, row in zip(responses, rows, strict=True)]

    return reward


def _equal(given: str, wanted: str) -> bool:
    try:
        return float(given.replace(",", "")) == float(wanted.replace(",", ""))
    except ValueError:
        return given == wanted


@register_reward("regex")
def _regex(pattern: str) -> Reward:
    """1 where the pattern is found in the response, else 0."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RewardError(f"trainer.grpo.reward regex: bad pattern {pattern!r}: {error}") from None
    return lambda responses, rows: [float(compiled.search(r) is not None) for r in responses]


@register_reward("length")
def _length(target: int, unit: str = "characters") -> Reward:
    """1 at `target` characters or words, falling linearly to 0 at none and at twice as many."""
    if unit not in ("characters", "words") or target < 1:
        raise RewardError(
            f"trainer.grpo.reward length: target={target} must be positive and unit={unit!r} characters or words"
        )

    def reward(responses, rows):
        sizes = [len(r) if unit == "characters" else len(r.split()) for r in responses]
        return [max(0.0, 1 - abs(size - target) / target) for size in sizes]

    return reward
