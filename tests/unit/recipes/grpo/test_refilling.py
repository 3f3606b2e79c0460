"""Which of the groups that a step has sampled are trained."""

import math

from recipes.grpo.refilling import SampledGroup, chosen_groups


def groups(*signals: bool) -> list[SampledGroup]:
    return [SampledGroup(i, None, [], [[0.0], [float(signal)]]) for i, signal in enumerate(signals)]


def numbers(*signals: bool, count: int) -> list[int]:
    return [group.number for group in chosen_groups(groups(*signals), count)]


def test_those_with_a_signal_come_first_in_the_order_of_the_data():
    assert numbers(False, True, True, False, True, True, count=3) == [1, 2, 4]
    assert numbers(True, True, True, count=2) == [0, 1]


def test_others_stand_in_where_they_are_too_few():
    assert numbers(False, True, False, False, True, count=4) == [1, 4, 0, 2]
    assert numbers(False, False, count=2) == [0, 1]


def test_equal_rewards_are_no_signal_and_neither_is_one_that_is_not_known():
    """The first number of each response; what follows, of several rewards, is not asked."""
    assert SampledGroup(0, None, [], [[0.1, 0.0], [0.2, 0.0]]).has_signal
    assert not SampledGroup(0, None, [], [[0.1, 0.0], [0.1, 1.0]]).has_signal
    assert not SampledGroup(0, None, [], [[0.1], [math.nan], [0.2]]).has_signal
