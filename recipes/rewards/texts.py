"""Rewards of how a text looks: regex, length, format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from recipes.cli.config import ConfigError
from recipes.rewards.registry import KEY, register_reward

__all__ = ["Length", "Regex", "TagFormat"]


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


@register_reward("format")
@dataclass(frozen=True)
class TagFormat:
    """1 where the response is `<think>...</think> <answer>...</answer>`: every tag once, in order, with something in it, and
    nothing but white space around them; else 0."""

    row_keys: ClassVar = ()

    tags: list[str] = field(default_factory=lambda: ["think", "answer"])
    # The prompt has opened the first tag, as chat templates of models that think do.
    opened: bool = False

    def __post_init__(self):
        wrong = [tag for tag in self.tags if not re.fullmatch(r"[\w-]+", tag)]
        if not self.tags or wrong or len({*self.tags}) < len(self.tags):
            raise ConfigError(f"{KEY}.tags={self.tags} must be names, each of them once, such as [think, answer]")

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        return [float(self._has_form(response)) for response in responses]

    def _has_form(self, response: str) -> bool:
        """By splitting, not by a pattern, which could take long on a text that is made for it."""
        rest = f"<{self.tags[0]}>{response}" if self.opened else response
        for tag in self.tags:
            before, opening, rest = rest.partition(f"<{tag}>")
            inside, closing, rest = rest.partition(f"</{tag}>")
            if before.strip() or not opening or not closing or not inside.strip() or self._has_tag(inside):
                return False
        return not rest.strip()

    def _has_tag(self, text: str) -> bool:
        return any(f"<{tag}>" in text or f"</{tag}>" in text for tag in self.tags)
