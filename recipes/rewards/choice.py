"""The reward choice: which letter a response chooses, and whether that is the row's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError
from recipes.rewards.exact_answer import ExactAnswer, without_thought
from recipes.rewards.registry import KEY, register_reward

__all__ = ["Choice"]

_STATED = ExactAnswer()
# What may stand around a letter: brackets, emphasis, quotes, LaTeX.
_BEFORE = r"""[\s*_`"'“(\[{$]*(?:\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{\s*\(?)*"""
_BEHIND = r"""[)\]}*_`"'”$]*"""
# Behind it: the end, a sign, or a word; but "A word" and "I think" choose nothing.
_GOES_ON = r"(?=\s*$|\s*[.:,;!?)—–-]|\s*\n|\s+(?:because|since|as|is|was|for)\b|{word})"
_OTHERS = re.compile(
    r"(?:\s*(?:,|/|&|;|and\b|or\b))+\s*(?:(?:option|choice)\s+)?[*(\[]*(?P<letter>[A-Za-z])(?![A-Za-z])"
)


@register_reward("choice")
@dataclass(frozen=True)
class Choice:
    """1 where the response chooses the letter that is row["answer"], else 0, and 0 where it chooses none or several.

    The choice stands where `exact_answer` looks for an answer; without a marker it begins the text, or follows the last "option".
    """

    row_keys: ClassVar = ("answer",)

    letters: str = "ABCDE"

    def __post_init__(self):
        if not re.fullmatch(r"[A-Z]{2,}", self.letters) or len({*self.letters}) < len(self.letters):
            raise ConfigError(
                f"{KEY}.letters={self.letters!r} must be capital letters, at least two, each of them once"
            )

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        return [float(self.chosen(r) == self._wanted(row)) for r, row in zip(responses, rows, strict=True)]

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuse a row whose answer is no letter.

        Raises:
            UserError: it is none.
        """
        self._wanted(row)

    def chosen(self, response: str) -> str | None:
        """The letter, a capital; None: none, or several."""
        said = without_thought(response)
        stated, is_marked = _STATED.stated(said)
        if is_marked:
            return self._letter(stated.strip())
        if found := self._letter(said.strip()):
            return found
        options = re.findall(rf"\b[Oo]ption\s+[*(\[]*([{self.letters}])(?![A-Za-z])", said)
        return options[-1] if options else None

    def _letter(self, text: str) -> str | None:
        """What a text begins with, if that is one letter alone."""
        for letters, word in (
            (re.sub("[AI]", "", self.letters), r"\s"),
            (self.letters, r"(?!)"),
            (self.letters.lower(), r"(?!)"),
        ):
            goes_on = _GOES_ON.format(word=word)
            pattern = rf"{_BEFORE}(?:[Oo]ption\s+|[Cc]hoice\s+)?[(\[*]*(?P<letter>[{letters}]){_BEHIND}{goes_on}"
            if letters and (found := re.match(pattern, text)):
                other = _OTHERS.match(text, found.end())
                letter = found["letter"].upper()
                several = other is not None and other["letter"].upper() in self.letters
                return None if several and other["letter"].upper() != letter else letter
        return None

    def _wanted(self, row: Mapping[str, Any]) -> str:
        answer = row.get("answer")
        found = re.fullmatch(r"\s*[(\[]?([A-Za-z])[)\].]*\s*", answer) if isinstance(answer, str) else None
        if found is None or found[1].upper() not in self.letters:
            raise UserError(
                f"its answer is {str(answer)[:40]!r}, and must be one of the letters {', '.join(self.letters)}"
            )
        return found[1].upper()
