"""What advantages are made of: the sum of a response's rewards, or each of them."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.losses import each_reward
from recipes.cli.compose import compose, forced
from recipes.cli.config import build
from recipes.grpo.advantages import AdvantageMaker
from recipes.grpo.settings import GRPOConfig
from tests.layouts import randn

pytestmark = pytest.mark.usefixtures("world")

WEIGHTS = [1.0, -0.5, 0.0]
EACH = "trainer.grpo.objective={name: grpo, advantages: gdpo}"


@each_reward
def weighed(rewards, weights):
    """One of one's own."""
    return (rewards * weights).sum(-1)


def maker(*overrides: str, weights=WEIGHTS, environments: bool = True) -> AdvantageMaker:
    given = forced(["data.train_path=x", "pretrained_checkpoint.restore_from_path=z", *overrides])
    settings = build(GRPOConfig, compose("grpo_tiny", given)).trainer.grpo
    return AdvantageMaker(settings, weights, environments, parallel_state.get_data_parallel_group())


def draw(rng) -> torch.Tensor:
    """Five prompts of four samples: the reward, how many were lost, three rewards, the environment's. The second reward does not
    score the last prompt, the third, which has no weight, has lost a response."""
    each = randn(rng, 5, 4, 4)
    each[4, :, 1] = each[1, 2, 2] = math.nan
    weights = torch.tensor([*WEIGHTS[:2], 1.0], dtype=torch.float64)
    total = (each[..., [0, 1, 3]].nan_to_num(0.0) * weights).sum(-1)
    return torch.cat((torch.stack((total, each[..., 2].isnan().double()), -1), each), -1)


def gdpo_by_hand(found: list, penalties: list) -> list[list[float]]:
    """One reward after the other, with the statistics of Python."""
    sums = [[0.0] * 4 for _ in found]
    for number, weight in ((2, 1.0), (3, -0.5), (5, 1.0), (None, 1.0)):
        for g, group in enumerate(found):
            values = penalties[g] if number is None else [sample[number] for sample in group]
            if any(x != x for x in values):
                continue
            mean, spread = statistics.mean(values), statistics.stdev(values) + 1e-6
            sums[g] = [s + weight * (x - mean) / spread for s, x in zip(sums[g], values, strict=True)]
    flat = [s for group in sums for s in group]
    return [[(s - statistics.mean(flat)) / (statistics.stdev(flat) + 1e-6) for s in group] for group in sums]


@pytest.mark.parametrize("buffer", [0, 4])
def test_gdpo_hears_each_reward_the_environments_and_the_penalty_for_length(buffer, rng):
    found = draw(rng)
    lengths = torch.randint(1, 9, (5, 4), generator=rng).double()
    penalties = [[min(0.0, max(-1.0, (4 - n) / 4)) * bool(buffer) for n in group] for group in lengths.tolist()]
    overrides = "trainer.grpo.length_params.max_length=8", f"trainer.grpo.overlong_buffer={buffer}"
    advantages, dropped = maker(EACH, *overrides).advantages(found, lengths)
    expected = torch.tensor(gdpo_by_hand(found.tolist(), penalties), dtype=torch.float64)
    assert (advantages - expected).abs().max() < 1e-12 and advantages.dtype == torch.float64 and dropped == []
    summed, _ = maker(*overrides).advantages(found, lengths)
    assert (advantages - summed).abs().max() > 0.1


def test_groups_of_which_a_reward_is_not_known_are_dropped_and_ask_nothing_of_others(rng):
    found, lengths = draw(rng), torch.ones(5, 4, dtype=torch.float64)
    found[2, 1, 0] = found[2, 1, 2] = math.nan
    drops = maker(EACH, "trainer.grpo.on_reward_timeout=drop")
    advantages, dropped = drops.advantages(found, lengths)
    assert dropped == [False, False, True, False, False] and torch.count_nonzero(advantages[2]) == 0
    left = [0, 1, 3, 4]
    assert torch.equal(advantages[left], maker(EACH).advantages(found[left], lengths[left])[0])
    assert drops.has_signal(found).tolist() == [True, True, False, True, True]
    nothing, dropped = drops.advantages(found[2:3], lengths[2:3])
    assert dropped == [True] and torch.count_nonzero(nothing) == 0


def test_a_signal_is_in_what_advantages_are_made_of(rng):
    """Two rewards that make up for each other, and one without a weight."""
    found = torch.tensor(
        [[[1.0, 0, 1, 0, 5], [1, 0, 2, 2, 6]], [[1, 0, 1, 0, 5], [1, 0, 1, 0, 6]]], dtype=torch.float64
    )
    assert maker(EACH, environments=False).has_signal(found).tolist() == [True, False]
    assert maker(environments=False).has_signal(found).tolist() == [False, False]
    assert maker(EACH, weights=[0.0, 0.0, 0.0], environments=False).has_signal(found).tolist() == [False, False]


def test_one_of_ones_own_may_be_of_each_reward(rng):
    found = draw(rng)
    mine = maker(f"trainer.grpo.objective={{name: grpo, advantages: {__name__}.weighed}}")
    advantages, _ = mine.advantages(found, torch.ones(5, 4, dtype=torch.float64))
    assert (advantages - found[..., 0]).abs().max() < 1e-12


def test_of_one_reward_gdpo_is_that_of_the_group_in_units_of_the_step(rng):
    found = torch.cat((randn(rng, 5, 4, 1), torch.zeros(5, 4, 1)), -1).repeat(1, 1, 2)[..., :3]
    advantages, _ = maker(EACH, weights=[1.0], environments=False).advantages(found, found[..., 1])
    of_group, _ = maker().advantages(found, found[..., 1])
    assert (advantages - (of_group - of_group.mean()) / (of_group.std() + 1e-6)).abs().max() < 1e-12
