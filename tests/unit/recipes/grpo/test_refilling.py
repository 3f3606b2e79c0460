"""Which of the groups that a step has sampled are trained."""

from recipes.grpo.refilling import SampledGroup, chosen_groups


def groups(*signals: bool) -> list[SampledGroup]:
    return [SampledGroup(i, None, [], [], signal) for i, signal in enumerate(signals)]


def numbers(*signals: bool, count: int) -> list[int]:
    return [group.number for group in chosen_groups(groups(*signals), count)]


def test_those_with_a_signal_come_first_in_the_order_of_the_data():
    assert numbers(False, True, True, False, True, True, count=3) == [1, 2, 4]
    assert numbers(True, True, True, count=2) == [0, 1]


def test_others_stand_in_where_they_are_too_few():
    assert numbers(False, True, False, False, True, count=4) == [1, 4, 0, 2]
    assert numbers(False, False, count=2) == [0, 1]
