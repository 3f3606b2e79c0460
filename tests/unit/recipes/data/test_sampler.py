"""The order in which rows are drawn."""

from __future__ import annotations

import json
import random
import re

import pytest

from recipes.data.sampler import EpochSampler


def draw(sampler, batches):
    return [sampler.next() for _ in range(batches)]


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (12, 4), (3, 8), (1, 2), (7, 7)])
def test_every_epoch_draws_every_index_once(count, batch):
    drawn = [i for b in draw(EpochSampler(count, batch, seed=3, rank=0, world=1), 5 * count) for i in b]
    assert len(drawn) == 5 * count * batch
    epochs = [drawn[i : i + count] for i in range(0, len(drawn), count)]
    assert all(sorted(e) == list(range(count)) for e in epochs)
    if count > 5:
        assert len({tuple(e) for e in epochs}) > 1, "the order must change between epochs"


def test_ranks_share_one_order():
    whole = draw(EpochSampler(50, 12, 1, 0, 1), 20)
    parts = [draw(EpochSampler(50, 12, 1, rank, 4), 20) for rank in range(4)]
    assert [sum(step, []) for step in zip(*parts, strict=True)] == whole


def test_the_seed_decides():
    one, same, other = (draw(EpochSampler(50, 10, seed, 0, 1), 10) for seed in (1, 1, 2))
    assert one == same != other


def test_position_comes_back_on_any_number_of_ranks():
    steps = random.SystemRandom().randrange(1, 40)
    sampler = EpochSampler(17, 6, 5, 0, 1)
    draw(sampler, steps)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = draw(sampler, 10)
    ranks = [EpochSampler(17, 6, 5, rank, 2) for rank in range(2)]
    for rank in ranks:
        draw(rank, 3)
        rank.load_state_dict(state)
    assert [a + b for a, b in zip(*(draw(r, 10) for r in ranks), strict=True)] == rest, f"after {steps} steps"


def test_sampler_refuses():
    with pytest.raises(ValueError, match=re.escape("batch=10")) as caught:
        EpochSampler(50, 10, 1, 0, 4)
    assert "world=4" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="0 rows"):
        EpochSampler(0, 10, 1, 0, 1)
    state = EpochSampler(50, 10, 1, 0, 1).state_dict()
    with pytest.raises(ValueError, match="count=50.*count=51"):
        EpochSampler(51, 10, 1, 0, 1).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=1.*seed=2"):
        EpochSampler(50, 10, 2, 0, 1).load_state_dict(state)
