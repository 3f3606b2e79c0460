"""Tests wait for what happens elsewhere, and say why it has not."""

from __future__ import annotations

import pytest

from tests.waiting import until


def test_it_gives_what_it_has_waited_for():
    looks = iter([0, None, [], "found"])
    assert until(lambda: next(looks), pause=0) == "found"


def test_what_cannot_happen_any_more_is_not_waited_for():
    with pytest.raises(AssertionError, match="^it is over: exit code 1"):
        until(lambda: False, lambda: "exit code 1", lambda: True)
    with pytest.raises(AssertionError, match="^not in 0 s: nothing said"):
        until(lambda: False, lambda: "nothing said", seconds=0)


def test_what_has_happened_just_before_the_end_has_happened():
    looks = iter([False, True])
    assert until(lambda: next(looks), over=lambda: True)
