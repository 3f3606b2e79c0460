"""Text to be shown does nothing to what shows it."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from recipes.data.visible import visible


def test_what_could_move_the_cursor_is_written_out():
    said = visible("a\n\x1b[31m\u202e\x00é\ud800東")
    assert said == "a\\n\\x1b[31m\\u202e\\x00é\\ud800東"
    assert visible("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert visible("\U0001f469\u200d\U0001f52c") == "\U0001f469\u200d\U0001f52c", "one picture stays one"


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_can_be_written_and_has_no_character_that_acts(text):
    said = visible(text)
    said.encode("utf-8")
    acting = {c for c in said if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")}
    assert acting <= {"\u200d", "\ufe0f"}
