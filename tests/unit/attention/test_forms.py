"""The choice of a plan's form: by the measured rule, logged once, or as asked."""

from __future__ import annotations

import logging

import pytest

from megatron_ext.attention import forms
from megatron_ext.attention.forms import MOST_COPIED_ROWS, choose_plan
from megatron_ext.grouping import PrefixGroups

MOST = int(MOST_COPIED_ROWS["cpu"])


def form_of(lengths, n: int = 4, m: int = 4, window=None, device="cpu", attention_plan="auto") -> str:
    plan = choose_plan(PrefixGroups.from_lengths(lengths), window, n, m, device, attention_plan)
    return "levels" if plan.copied is None and len(plan.calls) > 1 else "one_call"


@pytest.mark.parametrize("responses", [[5, 9], [200, 3, 70]])
def test_short_prompts_are_copied_and_long_ones_are_not(responses):
    assert form_of([(MOST, responses)]) == "one_call"
    assert form_of([(MOST + 1, responses)]) == "levels"


def test_fewer_key_heads_make_copying_cheaper():
    assert form_of([(4 * MOST, [5, 9])], n=8, m=2) == "one_call"
    assert form_of([(4 * MOST + 1, [5, 9])], n=8, m=2) == "levels"


def test_prompts_count_by_the_responses_below_them():
    """One long prompt among many short ones: the mean over documents that see anything before them."""
    assert form_of([(50 * MOST, [5, 9]), *[(MOST // 2, [3] * 8)] * 40]) == "one_call"
    assert form_of([(1000, [5] * 40), (4, [3] * 8)]) == "levels"


def test_where_nothing_was_measured_nothing_is_copied():
    assert form_of([(1, [5, 9])], device="cuda") == "levels"
    assert form_of([(1, [5, 9])], device="cuda", window=2) == "one_call"


def test_a_form_can_be_asked_for():
    assert form_of([(500, [5, 9])], attention_plan="one_call") == "one_call"
    assert form_of([(1, [5, 9])], attention_plan="levels") == "levels"
    assert form_of([(1, [5, 9])], attention_plan="levels", window=50) == "levels", "a window that hides nothing"
    with pytest.raises(ValueError, match="sliding window of 3 rows has no plan of levels"):
        form_of([(1, [5, 9])], attention_plan="levels", window=3)
    with pytest.raises(ValueError, match="unknown attention_plan 'tree'.*auto, levels, one_call"):
        form_of([(1, [5, 9])], attention_plan="tree")


def test_each_choice_is_logged_once(caplog):
    forms._log_form.cache_clear()
    with caplog.at_level(logging.INFO, logger="megatron_ext.attention.forms"):
        for _ in range(2):
            form_of([(1, [5, 9])])
            form_of([(400, [5, 9])])
            form_of([(400, [5, 9])], window=7)
    assert [r.getMessage() for r in caplog.records] == [
        "attention runs in one call over copied keys, because prefixes are short",
        "attention runs in a call per level of its prefix tree; shared keys are not copied",
        "attention runs in one call over copied keys, because its window slides",
    ]
