"""Dynamic sampling: in place of groups whose rewards are all equal, which teach nothing, others are sampled, up to a limit.

Source: DAPO (arXiv 2503.14476), section 3.2. A round samples as many prompts as a step takes, the next ones in the order of
the data; it is the last one where so many groups have been found whose rewards differ, over all data-parallel ranks, or where the
data end. Of these the first are trained, in the order in which they were drawn. What is left of them is thrown away with the
others: it would be of older weights in the next step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_ext.rollouts import Trajectory
from megatron_ext.runtime.collectives import gather_objects
from recipes.data.rows import Prompt
from recipes.grpo.rollouts import Rollouts, RolloutSampler

__all__ = ["RefillingSampler", "SampledGroup", "chosen_groups"]


@dataclass(frozen=True)
class SampledGroup:
    """A prompt with its responses and what they are worth.

    Attributes:
        number: of the prompt among all that the step has sampled.
        found: [samples][2 and more], as `RolloutSampler.rewarded` says it.
        has_signal: whether it teaches something; one whose rewards are not all known does not.
    """

    number: int
    prompt: Prompt
    trajectories: list[Trajectory]
    found: list[list[float]]
    has_signal: bool

    @property
    def rewards(self) -> list[float]:
        """NaN where one is not known."""
        return [of_one[0] for of_one in self.found]


def chosen_groups(groups: Sequence[SampledGroup], count: int) -> list[SampledGroup]:
    """The first so many that have a signal; where they are fewer, the first of the others stand in."""
    return sorted(groups, key=lambda group: not group.has_signal)[:count]


class RefillingSampler:
    """
    Args:
        draw: this data-parallel rank's share of the next prompts.
        has_next: whether there are prompts for another round.
    """

    def __init__(self, sampler: RolloutSampler, draw: Callable[[], list[Prompt]], has_next: Callable[[], bool]):
        self.sampler, self.draw, self.has_next, self.session = sampler, draw, has_next, sampler.session
        self.count, self.rounds = sampler.settings.num_prompts_per_grpo_step, sampler.settings.max_sampling_rounds

    def rollouts(self, step: int) -> tuple[Rollouts, dict[str, float]]:
        """Of this data-parallel rank, the same however ranks are laid out; and metrics of all that was sampled."""
        self.sampler.has_taken(step - 1)
        groups: list[SampledGroup] = []
        while self._goes_on(groups):
            groups += self._round(step, len(groups))
        found, rounds = sum(g.has_signal for g in groups), len(groups) // self.count
        if found < self.count:
            why = f"after trainer.grpo.max_sampling_rounds={self.rounds}"
            if rounds < self.rounds:
                why = "as there are no more rows to draw"
            self.session.say(
                f"step {step}: {found} of {len(groups)} groups have rewards that differ, and a step takes {self.count}: {why} "
                "others stand in, which teach nothing"
            )
        chosen = chosen_groups(groups, self.count)
        share = self.count // self.session.data_size
        mine = chosen[self.session.data_rank * share : (self.session.data_rank + 1) * share]
        rewards = [reward for group in groups for reward in group.rewards if not math.isnan(reward)]
        means = {"train_rollouts/reward": sum(rewards) / len(rewards)} if rewards else {}
        return self._rollouts(mine), means | {
            "train_rollouts/groups_with_signal": found / len(groups),
            "train_rollouts/sampling_rounds": rounds,
            "train_rollouts/thrown_away": 1 - self.count / len(groups),
        }

    def _goes_on(self, groups: list[SampledGroup]) -> bool:
        if not groups:
            return True
        wanted = len(groups) < self.rounds * self.count and sum(group.has_signal for group in groups) < self.count
        return wanted and self.has_next()

    def _round(self, step: int, before: int) -> list[SampledGroup]:
        """Groups of all data-parallel ranks, in the order in which their prompts were drawn."""
        prompts = self.draw()
        requests = self.sampler.requests(prompts, step, before)
        trajectories, found = self.sampler.rewarded(prompts, requests, self.sampler.source.sample(requests))
        first = before + self.session.data_rank * len(prompts)
        found = found.cpu()
        signal = self.sampler.advantages.has_signal(found).tolist()
        columns = range(first, first + len(prompts)), prompts, trajectories, found.tolist(), signal
        mine = [SampledGroup(*group) for group in zip(*columns, strict=True)]
        parts = gather_objects(mine, parallel_state.get_data_parallel_group())
        return [group for part in parts for group in part]

    def _rollouts(self, groups: Sequence[SampledGroup]) -> Rollouts:
        found = torch.tensor([g.found for g in groups], dtype=torch.float64, device=self.session.device)
        prompts, trajectories = [g.prompt for g in groups], [g.trajectories for g in groups]
        return self.sampler.valued(prompts, trajectories, found, [g.number for g in groups])
