"""The table of responses fits the terminal, whatever the model says."""

from __future__ import annotations

import random
import unicodedata

import pytest

from recipes.grpo.samples import fitted, table
from recipes.run.log_process import LoggedTable

LETTERS = "abc \u6771\u4eac\u0301é"


def columns(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) == "W" else 1 for c in text)


def some_text(longest: int) -> str:
    return "".join(random.choices(LETTERS, k=random.randint(0, longest)))


@pytest.mark.parametrize("end_only", [False, True])
def test_a_cell_is_as_wide_as_it_is_told(end_only):
    for _ in range(300):
        text, width = some_text(60), random.randint(8, 50)
        cell = fitted(text, width, end_only)
        assert columns(cell) == width, (text, width)
        if columns(text) <= width:
            assert cell.rstrip() == text.rstrip()
        else:
            begin, end = cell.rstrip().split("…")
            assert (
                text.startswith(begin.rstrip()) and text.rstrip().endswith(end.strip()) and (not end_only or not begin)
            )


def test_lines_are_no_wider_than_the_terminal():
    rows = [
        (random.gauss(0, 100), "stop_string", random.randint(1, 9999), some_text(500), some_text(500)) for _ in range(9)
    ]
    for width in (60, 97, 200):
        lines = table(rows, width).split("\n")
        assert len(lines) == 10 and max(map(columns, lines)) <= width
        assert all(f"{row[0]:.3g}" in line for row, line in zip(rows, lines[1:], strict=True))


def test_markdown_shows_what_the_model_says_and_follows_none_of_it():
    table = LoggedTable("samples", ["a", "b"], [[0.25, "<script>x</script> | `y`\n**z** \x1b[1m"]])
    *_, line = table.markdown().split("\n")
    assert line == "| 0.25 | &lt;script&gt;x&lt;/script&gt; &#124; &#96;y&#96;<br>&#42;&#42;z&#42;&#42; &#91;1m |"
