"""Advantages: by hand, and what must hold of them whatever the rewards are."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.losses import ADVANTAGES
from megatron_ext.losses.advantages import (
    gdpo_advantages,
    gpg_advantages,
    group_advantages,
    group_mean_advantages,
    groups_with_signal,
    leave_one_out_advantages,
    reinforce_advantages,
    takes_each,
)
from tests.layouts import randn


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-12)


def advantages(name: str, rewards: torch.Tensor) -> torch.Tensor:
    """Of one reward, where several could be."""
    of = ADVANTAGES[name]
    return of(rewards[..., None], tensor(1)) if takes_each(of) else of(rewards)


def by_hand(name: str, rewards: list[list[float]]) -> list[list[float]]:
    """With the statistics of Python, one reward at a time."""
    everything = [r for group in rewards for r in group]
    relative = [[r - statistics.mean(group) for r in group] for group in rewards]
    flat = [x for group in relative for x in group]
    grouped = [
        [x / (statistics.stdev(group) + 1e-6) for x in of_one] for group, of_one in zip(rewards, relative, strict=True)
    ]
    spread = statistics.stdev(x for group in grouped for x in group)
    differ = sum(len(set(group)) > 1 for group in rewards)
    of = {
        "group": lambda g, i: relative[g][i] / (statistics.stdev(rewards[g]) + 1e-6),
        "group_mean": lambda g, i: relative[g][i],
        "leave_one_out": lambda g, i: rewards[g][i] - statistics.mean(rewards[g][:i] + rewards[g][i + 1 :]),
        "batch": lambda g, i: relative[g][i] / (statistics.stdev(everything) + 1e-6),
        "reinforce_plus_plus": lambda g, i: (
            (rewards[g][i] - statistics.mean(everything)) / (statistics.stdev(everything) + 1e-6)
        ),
        "reinforce_plus_plus_baseline": lambda g, i: relative[g][i] / (statistics.stdev(flat) + 1e-6),
        "gpg": lambda g, i: relative[g][i] * len(rewards) / differ,
        "gdpo": lambda g, i: grouped[g][i] / (spread + 1e-6),
    }[name]
    return [[of(g, i) for i in range(len(rewards[g]))] for g in range(len(rewards))]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_by_hand(name, rng):
    rewards = torch.cat((tensor(1, 0, 0, 1, 5, 5, 5, 5).view(2, 4), randn(rng, 3, 4)))
    found = advantages(name, rewards)
    assert found.dtype == torch.float64 and close(found, tensor(*by_hand(name, rewards.tolist())))
    if name not in ("reinforce_plus_plus", "gdpo"):  # which ask what the rest of the step is
        assert torch.count_nonzero(found[1]) == 0  # all alike: nothing to learn, and no division by zero


def test_each_reward_has_a_say_in_gdpo_however_much_it_varies(rng):
    """Two rewards of which one has a thousand times the unit: scaling it changes nothing, where the plain sum hears it alone."""
    rewards, weights = randn(rng, 6, 4, 2), tensor(1, 2)
    found = gdpo_advantages(rewards, weights)
    assert close(found.mean(), tensor(0)) and abs(found.std() - 1) < 1e-5
    scaled = gdpo_advantages(rewards * tensor(1000, 1), weights)
    assert (found - scaled).abs().max() < 1e-4  # what is added to deviations
    by_group = sum(w * group_advantages(rewards[..., i]) for i, w in enumerate(weights))
    assert close(found, reinforce_advantages(by_group))
    assert torch.count_nonzero(gdpo_advantages(torch.full((3, 4, 2), 0.1), weights)) == 0


def test_gdpo_tells_apart_what_the_sum_makes_equal():
    """One of two rewards won, or both: of the sums, 0 and 1 or 0 and 2, the group's advantages are equal."""
    rewards = torch.tensor([[[0.0, 0], [1, 0]], [[0, 0], [1, 1]]])
    summed = group_advantages(rewards.sum(-1))
    assert (summed[0] - summed[1]).abs().max() < 1e-5
    found = gdpo_advantages(rewards, tensor(1, 1))
    assert close(found[1], 2 * found[0]) and found[0, 1] > 0


def test_leave_one_out_by_hand():
    """The baseline is the mean of the others: 3 - (1 + 2) / 2 and so on."""
    rewards = tensor(1, 2, 3).view(1, 3)
    assert close(leave_one_out_advantages(rewards), tensor(-1.5, 0, 1.5).view(1, 3))
    assert close(leave_one_out_advantages(rewards, True), tensor(-1.5, 0, 1.5).view(1, 3) / (1 + 1e-6))


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 100.1])
def test_equal_rewards_that_do_not_average_exactly_teach_nothing(value, name):
    """The mean of eleven times 0.1 is not 0.1 in floating point: that rounding must not be normalised to order 1."""
    for samples in range(2, 30):
        rewards = torch.full((3, samples), value)
        assert torch.count_nonzero(advantages(name, rewards)) == 0


@pytest.mark.parametrize("name", ADVANTAGES)
def test_large_rewards_that_differ_by_little_have_the_advantages_of_the_difference(name, rng):
    """Past 2^24, where fp32 has no odd numbers, and up to 2^53."""
    few = torch.randint(8, (5, 4), generator=rng).double()
    few[0] = tensor(0, 1, 2, 3)
    expected = advantages(name, few)
    assert name != "group" or torch.allclose(expected[0], tensor(-1.5, -0.5, 0.5, 1.5) / math.sqrt(5 / 3), atol=2e-6)
    for offset in (2.0**24, -(2.0**24), 2.0**52):
        assert torch.equal(advantages(name, few + offset), expected)


def test_advantages_of_a_group_do_not_favour_on_average(rng):
    """Their sum is 0 with either baseline, and normalised ones have standard deviation 1 whatever the unit of rewards,
    but for what is added to it."""
    for unit in (1e-3, 1.0, 1e6):
        rewards = unit * randn(rng, 7, 5)
        for advantages in (group_mean_advantages, leave_one_out_advantages, gpg_advantages):
            assert close(advantages(rewards).sum(1) / unit, torch.zeros(7))
        found = group_advantages(rewards)
        spread = rewards.std(1)
        assert close(found.sum(1), torch.zeros(7)) and close(found.std(1), spread / (spread + 1e-6))
        assert torch.equal(found.argsort(1), rewards.argsort(1))


def test_single_sample_groups():
    rewards = tensor(3, 4).view(2, 1)
    assert torch.count_nonzero(group_advantages(rewards)) == 0
    assert torch.count_nonzero(reinforce_advantages(rewards[:1])) == 0
    with pytest.raises(UserError, match="leave_one_out advantages need samples_per_prompt of at least 2"):
        leave_one_out_advantages(rewards)


def test_equal_rewards_carry_no_signal_whatever_their_rounding():
    """0.1 some times over need not average to 0.1 in fp32; its standard deviation is then not 0."""
    groups = [torch.full((1, n), value) for n in range(2, 33) for value in (0.1, 1 / 3, 0.7, 0.9)]
    assert any(bool(g.std(1) > 0) for g in groups)
    for group in groups:
        assert groups_with_signal(group).tolist() == [False]
        assert torch.count_nonzero(group_advantages(group)) == 0
    assert groups_with_signal(torch.tensor([[0.1, 0.1, 0.2]])).tolist() == [True]
    several = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[1, 1, 0], [1, 1, 0]], [[math.nan] * 3, [0, 1, 0]]])
    assert groups_with_signal(several).tolist() == [True, False, False], (
        "sums that are equal may be of rewards that differ"
    )
