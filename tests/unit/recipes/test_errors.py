"""A user's mistake is told from a bug of ours by who raised it."""

import json

from megatron_ext.grouping import PrefixGroups
from recipes.errors import is_user_error


def raised_by(function) -> BaseException:
    try:
        function()
    except ValueError as error:
        return error
    raise AssertionError("nothing was raised")


def test_our_own_checks_are_the_users_mistakes():
    assert is_user_error(raised_by(lambda: PrefixGroups.from_lengths([])))


def test_what_a_library_raises_is_our_bug():
    assert not is_user_error(raised_by(lambda: json.loads("{")))
