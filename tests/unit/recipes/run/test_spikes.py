"""A number far from those before it is told, with the numbers; what is usual is not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.run.spikes import LEAST, Spikes

NAME = "train_optim/grad_norm"


def look(spikes: Spikes, *values: float) -> list[list[str]]:
    return [spikes.look({NAME: value, "other": -value}) for value in values]


@given(seed=st.integers(), scale=st.floats(1e-6, 1e6), factor=st.floats(5, 50), sign=st.sampled_from([-1, 1]))
def test_a_spike_is_so_many_deviations_away(seed, scale, factor, sign):
    """Of numbers that lie evenly within 1 +- 0.1 the deviation is at most 1.4826 * 0.1."""
    rng = random.Random(seed)
    spikes = Spikes([NAME], factor)
    # Any twenty in a row lie evenly: of numbers drawn one by one half may be close together, and the rest spikes to them.
    places = [place for _ in range(3) for place in rng.sample(range(20), 20)]
    usual = [scale * (0.9 + 0.2 * (place + rng.random()) / 20) for place in places]
    assert not any(look(spikes, *usual[:40]))
    far = scale * (1.2 + factor * 0.15)
    (found,) = look(spikes, sign * far)
    assert len(found) == 1 and found[0].startswith(f"{NAME} is {sign * far:.4g}, the median of the 40 steps before ")
    assert not any(look(spikes, *usual[40:])), "one spike does not move the median"


@pytest.mark.parametrize("values", [[1.0] * 60, [0.0] * 60, [1 + 1e-5 * (i % 7) for i in range(60)]])
def test_numbers_that_hardly_move_have_no_spikes(values):
    assert not any(look(Spikes([NAME], 10.0), *values))


def test_nothing_is_compared_before_there_is_enough():
    spikes = Spikes([NAME], 10.0)
    assert not any(look(spikes, *[1.0, 2.0] * (LEAST // 2 - 1), 3.0, 1e9))
    assert look(spikes, 1e9)[0]
    assert not any(look(Spikes([NAME], None), *[1.0] * 40, 1e9)) and not Spikes([NAME], 10.0).look({})
