"""Advantages: what rewards become before they weigh tokens, by name (`advantages` of trainer.grpo.objective).

| name | advantage of a reward r | source |
|---|---|---|
| group | (r - mean of the group) / its standard deviation | DeepSeekMath, arXiv 2402.03300, eq. 3 |
| group_mean | r - mean of the group | Dr. GRPO, arXiv 2503.20783 |
| leave_one_out | r - mean of the OTHERS of the group | RLOO, arXiv 2402.14740 |
| batch | (r - mean of the group) / standard deviation of all rewards of the step | arXiv 2508.08221 |
| reinforce_plus_plus | (r - mean of all) / standard deviation of all | REINFORCE++, arXiv 2501.03262 |
| reinforce_plus_plus_baseline | x / standard deviation of all x, with x = r - mean of the group | the same |
| gpg | (r - mean of the group) times groups / groups whose rewards differ | GPG, arXiv 2504.02546 |
| gdpo | of several rewards, each as `group`, weighed and added up; then as reinforce_plus_plus | GDPO, arXiv 2601.05242 |

One of one's own is a function of the rewards of the whole step, named by its dotted path; its other arguments are options. With
`each_reward` it is one of every reward apart and of their weights, as gdpo's.

REINFORCE++ adds up a KL penalty over the rest of the response, and verl's normalises over tokens, so that long responses count
more in its mean: here the penalty in the reward is each token's own (`megatron_ext.losses.kl`) and every response counts once.

Rewards come, and advantages go, as [prompts, samples] in fp64, because fp32 holds integers up to 2^24 only; 1e-6 is added to
standard deviations. All count from the smallest reward: differences of large rewards are exact, and those of equal ones
exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from megatron_ext.errors import UserError

__all__ = [
    "batch_advantages", "each_reward", "gdpo_advantages", "gpg_advantages", "group_advantages", "group_mean_advantages",
    "groups_with_signal", "leave_one_out_advantages", "reinforce_advantages", "reinforce_baseline_advantages", "takes_each",
]  # fmt: skip

EPSILON = 1e-6
Function = TypeVar("Function", bound=Callable[..., Tensor])


def each_reward(function: Function) -> Function:
    """Decorator: it is called with rewards [prompts, samples, rewards] and weights [rewards], both fp64, in place of their
    weighted sums. A reward that does not score a row is 0 in all of its group."""
    function.takes_each = True
    return function


def takes_each(function: Callable[..., Tensor]) -> bool:
    """Whether it is marked so."""
    return getattr(function, "takes_each", False)


def group_advantages(rewards: Tensor) -> Tensor:
    """Relative to the group, in units of its standard deviation; a group whose rewards are all equal gets zero.

    Args:
        rewards: [prompts, samples], finite.

    Returns:
        [prompts, samples], fp64.
    """
    return group_mean_advantages(rewards) / _deviation(rewards, (1,))


def group_mean_advantages(rewards: Tensor) -> Tensor:
    """Relative to the group alone. Shapes as in `group_advantages`."""
    rewards = _from_smallest(rewards, (1,))
    return rewards - rewards.mean(1, keepdim=True)


def leave_one_out_advantages(rewards: Tensor, normalize: bool = False) -> Tensor:
    """Relative to the mean of the others of the group. Shapes as in `group_advantages`.

    Args:
        normalize: divide by the group's standard deviation.

    Raises:
        UserError: a group of one.
    """
    samples = rewards.size(1)
    if samples < 2:
        raise UserError("leave_one_out advantages need samples_per_prompt of at least 2")
    counted = _from_smallest(rewards, (1,))
    advantages = counted - (counted.sum(1, keepdim=True) - counted) / (samples - 1)
    return advantages / _deviation(rewards, (1,)) if normalize else advantages


def batch_advantages(rewards: Tensor) -> Tensor:
    """Relative to the group, in units of the step's standard deviation. Shapes as in `group_advantages`."""
    return group_mean_advantages(rewards) / _deviation(rewards, (0, 1))


def reinforce_advantages(rewards: Tensor) -> Tensor:
    """Relative to the step, in units of its standard deviation. Shapes as in `group_advantages`."""
    counted = _from_smallest(rewards, (0, 1))
    return (counted - counted.mean()) / _deviation(rewards, (0, 1))


def reinforce_baseline_advantages(rewards: Tensor) -> Tensor:
    """Relative to the group, in units of the standard deviation of all that is so. Shapes as in `group_advantages`."""
    advantages = group_mean_advantages(rewards)
    return advantages / _deviation(advantages, (0, 1))


def gpg_advantages(rewards: Tensor) -> Tensor:
    """Relative to the group; those that differ speak for those that do not. Shapes as in `group_advantages`."""
    differ = groups_with_signal(rewards).sum()
    return group_mean_advantages(rewards) * (rewards.size(0) / differ.clamp(min=1))


@each_reward
def gdpo_advantages(rewards: Tensor, weights: Tensor) -> Tensor:
    """Of several rewards, each in units of its own standard deviation in the group before they are added up, so that none is
    drowned by one that varies more (GDPO, arXiv 2601.05242); then in units of the step's.

    Args:
        rewards: [prompts, samples, rewards], finite.
        weights: [rewards].

    Returns:
        [prompts, samples], fp64.
    """
    counted = _from_smallest(rewards, (1,))
    each = (counted - counted.mean(1, keepdim=True)) / _deviation(rewards, (1,))
    return reinforce_advantages((each * weights.to(each)).sum(-1))


def groups_with_signal(rewards: Tensor) -> Tensor:
    """bool [prompts]: whether the rewards of a group differ; a group of equal ones teaches nothing.

    Args:
        rewards: [prompts, samples], or of several [prompts, samples, rewards]; a NaN tells of no difference.
    """
    differ = rewards.amax(1) > rewards.amin(1)
    return differ.flatten(1).any(1) if differ.dim() > 1 else differ


def _from_smallest(rewards: Tensor, dims: tuple[int, ...]) -> Tensor:
    rewards = rewards.double()
    return rewards - rewards.amin(dims, keepdim=True)


def _deviation(rewards: Tensor, dims: tuple[int, ...]) -> Tensor | float:
    """The standard deviation, and a little; that of a single reward is not defined, and its advantage is 0 anyway."""
    counted = _from_smallest(rewards, dims)
    if all(counted.size(d) == 1 for d in dims):
        return 1.0
    return counted.std(dims, keepdim=True) + EPSILON
