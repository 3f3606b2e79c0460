"""The reward rarer_word: of two words, such as pronouns, that is worth more which the other responses to the prompt say less."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError
from recipes.rewards.registry import KEY, register_reward

__all__ = ["RarerWord"]


@register_reward("rarer_word")
@dataclass(frozen=True)
class RarerWord:
    """What a response is worth whose first word of the two is w, in a group of which n_w responses say w and n say either:
    `said` + 1 - n_w / n. One that says neither is worth 0.

    A reward that all responses of a group share has no advantage; this one differs within a group as long as one word is rarer,
    and is the same for both words where they are even: that is where training comes to rest. Of a group in which all say the same
    there is nothing to learn but that saying a word is worth more than saying none.

    A row with an `answer`, one of the two words, is one whose prompt asks for it, by a hint: the response that says it is worth
    1 + `said`, one that says the other `said`.
    """

    row_keys: ClassVar = ("answer",)

    words: list[str] = field(default_factory=lambda: ["he", "she"])
    # What saying either word is worth beside: without it a model may learn to say neither.
    said: float = 0.5

    def __post_init__(self):
        words = [word.lower() for word in self.words]
        if len(words) != 2 or words[0] == words[1] or not all(re.fullmatch(r"\w+", word) for word in words):
            raise ConfigError(f"{KEY}.words={self.words} must be two different words")
        if self.said < 0:
            raise ConfigError(f"{KEY}.said={self.said} must be at least 0")

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        groups = [
            json.dumps(row, sort_keys=True, default=str) for row in rows
        ]  # of a prompt, also where several are asked
        words = [self._first(response) for response in responses]
        said = Counter((group, word) for group, word in zip(groups, words, strict=True) if word is not None)
        found = []
        for group, word, row in zip(groups, words, rows, strict=True):
            if word is None:
                found.append(0.0)
            elif (answer := self._answer(row)) is not None:
                found.append(self.said + float(word == answer))
            else:
                either = sum(said[group, other.lower()] for other in self.words)
                found.append(self.said + 1 - said[group, word] / either)
        return found

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuse a row whose answer is neither word.

        Raises:
            UserError: it is neither.
        """
        self._answer(row)

    def _first(self, response: str) -> str | None:
        found = re.search(rf"\b(?:{'|'.join(self.words)})\b", response, re.IGNORECASE)
        return found and found[0].lower()

    def _answer(self, row: Mapping[str, Any]) -> str | None:
        answer = row.get("answer")
        if answer is None:
            return None
        if not isinstance(answer, str) or answer.lower() not in [word.lower() for word in self.words]:
            raise UserError(
                f"its answer is {str(answer)[:40]!r}, and must be {' or '.join(self.words)}, or be left out"
            )
        return answer.lower()
