"""The reward math: whether two answers are equal as mathematics, by math-verify (https://github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from recipes.rewards.choice import Choice
from recipes.rewards.exact_answer import ExactAnswer, without_thought
from recipes.rewards.registry import register_reward

__all__ = ["MathAnswer"]

LONGEST = 300  # characters of a text that is a formula as a whole
_EXACT, _CHOICE = ExactAnswer(), Choice()
_LETTER = re.compile(r"\s*\(?[A-E]\)?\s*")
_FORMULA = re.compile(r"\$|\\\(|\\\[|\\boxed")
_COUNTED = re.compile(
    r"[-−+]?[\d.,]*\d(?:/\d+)?(?:\s+(?!(?:or|and|to|factorial|squared|cubed|plus|minus|times|over|choose|divided)\b)[^\W\d]{2,})+"
)
_NOT = re.compile(r"\bnot\b|n['’]t\b", re.I)


@register_reward("math")
@dataclass(frozen=True)
class MathAnswer:
    """1 where the response's answer is equal to row["answer"], else 0.

    It stands where `exact_answer` looks for it, and what is equal there is equal here, too. Its limit in time is that of the
    process that it runs in: math-verify's own, an alarm, would give 0 for what has not been compared.
    """

    row_keys: ClassVar = ("answer",)

    # Decimals to which numbers are rounded before they are compared.
    decimals: int = 6

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuse a row without an answer.

        Raises:
            UserError: it has none.
        """
        _EXACT.check(row)

    def prepare(self) -> None:
        """Import sympy, which takes a second, before the time of a call begins."""
        import math_verify  # noqa: F401

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        return [float(self._is_right(r, row)) for r, row in zip(responses, rows, strict=True)]

    def _is_right(self, response: str, row: Mapping[str, Any]) -> bool:
        self.check(row)
        answer, said = str(row["answer"]), without_thought(response)
        if _LETTER.fullmatch(answer):
            return bool(_CHOICE([said], [row])[0])
        if _EXACT([said], [row])[0]:
            return True
        wanted = [_parsed(text) for text in _answers(answer)]
        return any(self._equal(gold, _parsed(text)) for text in _answers(said) for gold in wanted)

    def _equal(self, wanted: list, given: list) -> bool:
        from math_verify import verify

        return bool(
            verify(wanted, given, float_rounding=self.decimals, allow_set_relation_comp=True, timeout_seconds=None)
        )


def _answers(text: str) -> Iterator[str]:
    """What a text may give as its answer, for math-verify to read: all of it, the formula that it marks as such, or the number
    that plain words follow. math-verify by itself takes any number that it finds: 12 out of "not 12", and of "12 or 13"."""
    texts = _EXACT.texts(text)
    for stated in texts:
        bare = stated.strip().removesuffix(".")
        if _NOT.search(bare):
            continue
        if _FORMULA.search(bare) or _COUNTED.fullmatch(bare):
            yield f"The answer is {bare}" if len(texts) > 1 or _EXACT.stated(text)[1] else bare
        elif len(bare) <= LONGEST:
            yield f"\\boxed{{{bare}}}"


@lru_cache(4096)
def _parsed(text: str) -> list:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # that it has no limit of its own is meant
    return math_verify.parse(text, parsing_timeout=None)
