r"""The reward exact_answer: where a response states its answer, and whether that is the row's.

An answer counts as a whole (`recipes.rewards.notation`): no number is picked out of a text that says more than it.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError
from recipes.rewards.notation import SCALES, Answer, agree, read
from recipes.rewards.spelling import closing_brace

__all__ = ["ENOUGH_RESPONSES", "ExactAnswer", "without_thought"]

logger = logging.getLogger(__name__)

ENOUGH_RESPONSES = 32  # without a readable answer, until that is said

# What states an answer. The last one in a text counts: a model may correct itself.
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARKER = re.compile(
    rf"####|<answer>|{_BOX.pattern}"
    r"|(?i:\banswer[ \t*_]*[:：]"  # Answer:, **Final answer**:
    r"|^[ \t#*_]*(?:the )?(?:final )?answer[ \t*_]*$)",  # a heading
    re.M,
)
# Weaker: looked for in the line behind a marker ("Final Answer: The final answer is 42."), or in a text without one.
_PHRASE = re.compile(r"\banswer\s+(?:is|was|would be|should be|will be|equals)\b(?:[ \t*_]*[:：])?", re.I)
_LEAD_IN = re.compile(r"\s*(?:(?:it|that|this)(?: is|'s|’s)|(?:there|they) are|equal to)\s", re.I)
_DISPLAY = re.compile(r"\s*(?:\$\$.+?\$\$|\\\[.+?\\\])[ .]*(?=\n|\Z)", re.S)
_DIGIT = re.compile(r"\d")
_SENTENCE_END = re.compile(r"""\.[*_`$"')\]]*(?=\s+[^\s\d])""")
# What makes a box a part of something larger: of a formula (\frac{\boxed{3}}{4}), or of a number in words.
_OPERATOR = r"[\d+\-/^_×·÷√±]|(?<!\*)\*(?!\*)"
_JOINED_BEFORE = re.compile(
    rf"(?:{_OPERATOR}|[{{)\]]|(?<!\\text)\{{[^{{}}]*\}}|\\(?:times|cdot|div|pm|sqrt|pi|ln|log|sin|cos|tan))[\s$]*\Z"
    r"|(?<![\\A-Za-z])[A-Za-z]+\Z"
)
_JOINED_BEHIND = re.compile(
    rf"[\s$]*(?!\^\{{?\\circ)(?:{_OPERATOR}|[{{}}]|[.,]\d|(?:\\text\s*\{{\s*)?(?:{'|'.join(SCALES)})"
    r"|\\(?=[A-Za-z])(?!text|mbox|mathrm|q?quad|right|end|tag|qed|square|degree))|[(\[A-Za-z]"
)


@dataclass
class _Watch:
    """Says once why all rewards are 0: the first responses stated no answer that could be read."""

    seen: int = 0
    is_over: bool = False

    def look(self, response: str, answer: Any, is_readable: bool) -> None:
        self.seen += 1
        self.is_over = self.is_over or is_readable
        if self.is_over or self.seen < ENOUGH_RESPONSES:
            return
        self.is_over = True
        if os.environ.get("RANK", "0") == "0":
            logger.warning(
                "reward exact_answer: none of the first %d responses states an answer that can be read, so all got 0. The last "
                "one ends in %r, and its row's answer is %r; docs/data.md says how an answer is stated",
                self.seen, response[-80:], answer if len(str(answer)) <= 80 else f"{str(answer)[:77]}...",
            )  # fmt: skip


@dataclass(frozen=True)
class ExactAnswer:
    r"""1 where the response's answer is row["answer"], else 0.

    The answer is what the last marker states ("#### 42", "Answer: 42", \boxed{42}, <answer>42</answer>), else what follows the
    last "the answer is", else the whole response. Behind a marker it ends with its line, a number or a letter already with its
    sentence. The row's answer may be stated like that, too.
    """

    row_keys: ClassVar = ("answer",)

    # Text before the answer, instead of all of those.
    marker: str | None = None
    _watch: _Watch = field(default_factory=_Watch, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.marker is not None and not self.marker.strip():
            raise ConfigError(
                "trainer.grpo.reward.marker is empty; name the text that stands before an answer, or leave it out"
            )

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        return [float(self._is_right(r, row)) for r, row in zip(responses, rows, strict=True)]

    def check(self, row: dict) -> None:
        """Refuse a row without an answer.

        Raises:
            UserError: it has none.
        """
        self._wanted(row)

    def texts(self, text: str) -> list[str]:
        """What may be the answer that a text states, longest first: behind a marker its line, and that line's first sentence."""
        stated, is_marked = self.stated(text)
        if not is_marked:
            return [stated]
        line, _ = _line(stated)
        end = _SENTENCE_END.search(line)
        shorter = [line[: end.end()]] if end and not _DIGIT.search(line, end.end()) else []
        return list(dict.fromkeys([stated, line, *shorter]))

    def _is_right(self, response: str, row: Mapping[str, Any]) -> bool:
        wanted, answer = self._wanted(row), row["answer"]
        stated, is_marked = self.stated(without_thought(response))
        readings = _readings(stated, is_marked)
        result = any(agree(given, wanted) or _is_json(given, answer) for given in readings)
        is_readable = is_marked if wanted.number is None else any(r.number is not None for r in readings)
        self._watch.look(response, answer, result or is_readable)
        return result

    def _wanted(self, row: Mapping[str, Any]) -> Answer:
        answer = row.get("answer")
        is_value = isinstance(answer, (str, int)) or (isinstance(answer, float) and math.isfinite(answer))
        stated, is_marked = self.stated(str(answer)) if is_value else ("", False)
        if not stated.strip():
            only = f"its row has only {', '.join(row) or 'nothing'}"
            found = f"its answer is {answer!r}" if "answer" in row else only
            raise UserError(f"no answer to compare with ({found}); add answer, text or a number")
        return _readings(stated, is_marked)[0]

    def stated(self, text: str) -> tuple[str, bool]:
        """The text from where the answer begins, and whether a marker says so."""
        if self.marker is not None:
            _, found, stated = text.rpartition(self.marker)
            return stated, bool(found)
        markers = deque(_MARKER.finditer(text), maxlen=1)
        if not markers:
            return _behind_phrase(text, text)
        last = markers.pop()
        if _BOX.fullmatch(last[0]):
            return _boxed(text[text.rfind("\n", 0, last.start()) + 1 :]), True
        stated = text[last.end() :].partition("</answer>")[0].lstrip()
        return _behind_phrase(stated, _line(stated)[0])[0], True


def _readings(stated: str, is_marked: bool) -> list[Answer]:
    """What an answer may be: the line behind a marker first. More than that is text, less a number or a letter."""
    whole = read(stated)
    if not is_marked:
        return [whole]
    line, rest = _line(stated)
    if read(_line(rest)[0]).is_short:  # a list, one on each line
        return [whole]
    bare = line[lead.end() :] if (lead := _LEAD_IN.match(line)) else line
    shorter = [read(bare)]
    if end := _SENTENCE_END.search(bare):
        first, others = read(bare[: end.end()]), bare[end.end() :]
        if first.number is None or not _DIGIT.search(others):  # "12. No, it is 13."
            shorter.append(first)
    return [read(line), whole, *(answer for answer in shorter if answer.is_short)]


def _is_json(given: Answer, answer: Any) -> bool:
    """What JSON makes of a text is equal, too: true is "true", and a number with a point the nearest double."""
    if isinstance(answer, bool):
        return given.text.casefold() == str(answer).casefold()
    if not isinstance(answer, float) or given.number is None or given.unit:
        return False
    try:
        return float(given.number) == answer
    except OverflowError:
        return False


def without_thought(response: str) -> str:
    """What follows the reasoning; nothing, if that does not end: what stands in it is no answer yet."""
    said = response.rpartition("</think>")[2]
    return "" if "<think>" in said else said


def _behind_phrase(text: str, within: str) -> tuple[str, bool]:
    """`text` from behind the last phrase in its beginning `within`."""
    end = max((found.end() for found in _PHRASE.finditer(within)), default=None)
    return (text, False) if end is None else (text[end:], True)


def _line(text: str) -> tuple[str, str]:
    """The first line that is not blank, or the formula that is displayed there, and what follows."""
    if formula := _DISPLAY.match(text):
        return formula[0], text[formula.end() :]
    line, _, rest = text.lstrip().partition("\n")
    return line, rest


def _boxed(text: str) -> str:
    """What the boxes in `text`, a line and what follows it, hold; all of it, if one is not closed or not by itself."""
    held: dict[str, None] = {}
    position = 0
    while box := _BOX.search(text, position):
        end = closing_brace(text, box.end())
        before = re.sub(r"\A\s*[-*+] ", "", text[max(0, box.start() - 100) : box.start()])  # less a list's bullet
        if end is None or _JOINED_BEFORE.search(before) or _JOINED_BEHIND.match(text, end + 1):
            return text
        held[text[box.end() : end]] = None
        position = end + 1
    return ", ".join(held)
