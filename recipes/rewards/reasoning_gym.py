"""The verifiers of reasoning-gym (https://github.com/open-thought/reasoning-gym): procedural problems, scored offline.

tools/make_reasoning_gym.py writes the rows. Needs the extra `gym`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from recipes.cli.config import ConfigError
from recipes.rewards.registry import KEY, register_reward

__all__ = ["ReasoningGym", "load_reasoning_gym", "verifier"]

PARTS = {"task": str, "answer": object, "metadata": dict}


@register_reward("reasoning_gym")
@dataclass(frozen=True)
class ReasoningGym:
    """What a task's own verifier gives an answer, 0 to 1.

    Rows have `{"reasoning_gym": {"task", "answer", "metadata"}}`.

    Attributes:
        tag: the answer stands in <tag> and </tag>, the last ones count, and 0 is given without them; null: it is all of the text.
    """

    row_keys: ClassVar = ("reasoning_gym",)

    tag: str | None = "answer"

    def __post_init__(self):
        load_reasoning_gym()

    def check(self, row: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: it is no row of a task.
        """
        entry = row.get("reasoning_gym")
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in PARTS.items()):
            raise ValueError(
                "reasoning_gym must be an object of task, answer and metadata, as tools/make_reasoning_gym.py writes"
            )
        verifier(entry["task"])

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        return [self._score(text, row["reasoning_gym"]) for text, row in zip(responses, rows, strict=True)]

    def _score(self, text: str, entry: Mapping[str, Any]) -> float:
        if self.tag is None:
            answer = text.strip()
        else:
            from reasoning_gym.utils import extract_answer

            answer = extract_answer(text, self.tag)
        return 0.0 if answer is None else float(verifier(entry["task"])(answer=answer, entry=entry))


@functools.cache
def verifier(task: str) -> Callable[..., float]:
    """(answer, entry) -> 0 to 1.

    Raises:
        ValueError: there is no such task.
    """
    return load_reasoning_gym().get_score_answer_fn(task)


def load_reasoning_gym() -> ModuleType:
    """
    Raises:
        ConfigError: it is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            f"{KEY}=reasoning_gym needs the package reasoning-gym, which cannot be imported ({error}): install the extra, "
            "pip install 'megatron-ext[gym]'"
        ) from error
    return reasoning_gym
