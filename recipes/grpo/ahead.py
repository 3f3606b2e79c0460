"""Rollouts sampled ahead of training: while one step is trained, servers sample those that follow with older weights.

How old is bounded: no token that step k trains was sampled by weights of before step k - max_staleness.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.rollouts import Request
from megatron_ext.rollouts.vllm import Begun, VllmSource
from recipes.data.rows import Prompt
from recipes.data.sampler import Sampler
from recipes.grpo.rollouts import Rollouts, RolloutSampler

__all__ = ["AheadSampler"]


@dataclass
class StepAhead:
    """What is sampled for one step."""

    prompts: list[Prompt]
    requests: list[Request]
    begun: Begun


class AheadSampler:
    """
    Args:
        sampler: its source goes on sampling while it is not asked.
        prompts: of the run.
        order: of these, over the steps that are trained: what a checkpoint keeps. What is sampled ahead is drawn from a copy.
    """

    def __init__(self, sampler: RolloutSampler, prompts: Sequence[Prompt], order: Sampler):
        self.sampler, self.prompts, self.order = sampler, prompts, order
        self.settings = sampler.settings
        self.updates = (
            self.settings.num_prompts_per_grpo_step // sampler.config.prompts_per_update
        )  # of the weights, in a step
        self._drawing: Sampler | None = None
        self._begun: deque[StepAhead] = deque()

    def rollouts(self, step: int) -> Rollouts:
        """Of this data-parallel rank's next prompts; the servers have the weights of before this step, and go on with the next
        ones. Steps come one after the other."""
        if self._drawing is None:  # when a run that goes on has put the order where it was
            self._drawing = copy.copy(self.order)
        self.sampler.has_taken(step - 1)
        last = min(step + self.settings.max_staleness, self.settings.max_steps)
        for number in range(step + len(self._begun), last + 1):
            if self._drawing.has_next():
                self._begun.append(self._begin(number))
        mine = self._begun.popleft()
        rollouts = self.sampler.scored(mine.prompts, mine.requests, self._source.finish(mine.begun))
        oldest = self._oldest(step)
        assert all(
            p.weight_version >= oldest
            for group in rollouts.trajectories
            for t in group
            for p in t.passages
            if p.sampled
        )
        self.order.next()
        return rollouts

    def staleness(self, step: int, rollouts: Rollouts) -> dict[str, float]:
        """Metrics: how many steps before those that are trained the weights were that sampled."""
        session, responses = self.sampler.session, [t for group in rollouts.trajectories for t in group]
        now = (step - 1) * self.updates
        ages = [
            [((now - p.weight_version) / self.updates, len(p.tokens)) for p in t.passages if p.sampled]
            for t in responses
        ]
        total = sum(steps * tokens for response in ages for steps, tokens in response)
        mixed = sum(len({steps for steps, _ in response}) > 1 for response in ages)
        tokens = sum(tokens for response in ages for _, tokens in response)
        total, tokens, mixed, count = session.sum_over_data(total, tokens, mixed, len(responses))
        return {
            "train_rollouts/staleness": total / tokens,
            "train_rollouts/staleness_max": session.largest_over_data(max(n for response in ages for n, _ in response)),
            "train_rollouts/mixed_weights": mixed / count,
        }

    def _begin(self, step: int) -> StepAhead:
        prompts = [self.prompts[i] for i in self._drawing.next()]
        requests = self.sampler.requests(prompts, step)
        return StepAhead(prompts, requests, self._source.begin(requests, self._oldest(step), priority=step))

    def _oldest(self, step: int) -> int:
        """The fewest updates that weights may have had which sample for a step."""
        return max(0, step - 1 - self.settings.max_staleness) * self.updates

    @property
    def _source(self) -> VllmSource:
        return self.sampler.source
