"""A few responses with their rewards, to be read: as a table for a terminal."""

from __future__ import annotations

import itertools
import shutil
import unicodedata
from collections.abc import Iterator, Sequence

from recipes.data.tokenizer import Tokenizer
from recipes.data.visible import visible
from recipes.grpo.rollouts import Rollouts

__all__ = ["COLUMNS", "fitted", "shown", "table"]

COLUMNS = ("reward", "ended by", "tokens", "prompt", "response")
PROMPTS = 2  # whose best and worst response are shown
LONGEST = 2000  # characters of a cell
MARK = " … "

Row = tuple[float, str, int, str, str]


def shown(tokenizer: Tokenizer, rollouts: Rollouts) -> list[Row]:
    """The best and the worst response of the first prompts: reward, why it ended, its tokens, the end of the prompt, the
    response."""
    rows = []
    groups = zip(rollouts.prompts, rollouts.trajectories, rollouts.rewards.tolist(), strict=True)
    for prompt, group, rewards in itertools.islice(groups, PROMPTS):
        order = sorted(range(len(group)), key=rewards.__getitem__)
        text = tokenizer.decode_whole(prompt.tokens)[-LONGEST:]
        for i in (order[-1], order[0]):
            said = tokenizer.decode_response(prompt.tokens, group[i].tokens)
            half = (LONGEST - len(MARK)) // 2
            said = said if len(said) <= LONGEST else said[:half] + MARK + said[-half:]
            rows.append((rewards[i], str(group[i].finish_reason), len(group[i]), text, said))
    return rows


def table(rows: Sequence[Row], width: int | None = None) -> str:
    """Lines of at most `width` columns; None: as wide as the terminal."""
    width = max(width or shutil.get_terminal_size((120, 24)).columns, 60)
    cells = [(f"{reward:.3g}", ended, str(tokens)) for reward, ended, tokens, _, _ in rows]
    sizes = [max(len(line[i]) for line in (COLUMNS[:3], *cells)) for i in range(3)]
    left = width - sum(sizes) - 2 * 4
    sizes += [left // 3, left - left // 3]
    lines = ["  ".join((*map(str.ljust, COLUMNS[:4], sizes[:4]), COLUMNS[4]))]
    for row, cell in zip(rows, cells, strict=True):
        texts = fitted(visible(row[3]), sizes[3], end_only=True), fitted(visible(row[4]), sizes[4])
        lines.append("  ".join((*map(str.ljust, cell, sizes), texts[0], texts[1].rstrip())))
    return "\n".join(lines)


def fitted(text: str, width: int, end_only: bool = False) -> str:
    """Exactly so many columns: its beginning and its end, or its end alone, where it is longer."""
    if (missing := width - sum(map(_columns, text))) >= 0:
        return text + " " * missing
    mark = MARK.strip() if end_only else MARK
    room = width - len(mark)
    head = "" if end_only else "".join(_within(text, room // 2))
    tail = "".join(_within(reversed(text), room - sum(map(_columns, head))))[::-1]
    line = head + mark + tail
    return line + " " * (width - sum(map(_columns, line)))


def _within(text: Sequence[str] | Iterator[str], width: int) -> Iterator[str]:
    for character in text:
        width -= _columns(character)
        if width < 0:
            return
        yield character


def _columns(character: str) -> int:
    """Of a terminal that it takes."""
    if unicodedata.combining(character) or character in "\u200d\ufe0f":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
