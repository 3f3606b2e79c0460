"""What a GRPO step learns from: responses of every prompt, sampled by the policy, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.rollouts import Request, Source, Trajectory
from megatron_ext.rollouts.observing import THREADS
from megatron_ext.runtime.collectives import broadcast, broadcast_object, gather_objects, met_by_all, together
from megatron_ext.runtime.progress import PROGRESS
from recipes.data.rows import Prompt
from recipes.data.tokenizer import Tokenizer
from recipes.environments.processes import Environments
from recipes.environments.registry import Named
from recipes.grpo.advantages import AdvantageMaker
from recipes.grpo.conversations import Conversations, tool_format
from recipes.grpo.recorded import RecordedSource
from recipes.grpo.settings import GRPOConfig
from recipes.grpo.validation import ValidationSet
from recipes.rewards.several import Rewards
from recipes.run.session import Session

__all__ = ["Answered", "RolloutSampler", "Rollouts", "in_parts", "response_texts"]

T = TypeVar("T")
# In place of a step's number in the random numbers of a validation: no step has it.
VALIDATION = 2**32 - 1


@dataclass
class Rollouts:
    """This data-parallel rank's share of one step.

    Attributes:
        trajectories: [prompts][g], what followed.
        rewards: fp64 [prompts, g]; NaN where a reward did not score a response in time, which drops its group.
        advantages: fp64 [prompts, g]; 0 in groups that are dropped.
        signal: bool [prompts]: whether rewards of the group differ, so that it teaches something; None: nobody asks.
        parts: fp64 [prompts, g, rewards], what `rewards` is the weighted sum of; NaN where a reward does not score the row, or
            did not in time. None: rewards come out of a file.
        lost: fp64 [prompts, g]: how many rewards did not score a response in time; None as well.
        dropped: of each group, whether it is not trained on; empty: none.
        numbers: that the random numbers of each group were drawn from; None: its place in the step.
    """

    prompts: list[Prompt]
    trajectories: list[list[Trajectory]]
    rewards: Tensor
    advantages: Tensor
    signal: Tensor | None = None
    parts: Tensor | None = None
    lost: Tensor | None = None
    dropped: Sequence[bool] = ()
    numbers: Sequence[int] | None = None

    def lengths(self, groups: Sequence[int]) -> list[tuple[int, list[int]]]:
        """(prompt length, [response lengths]) of these groups."""
        return [(len(self.prompts[g].tokens), [len(t) for t in self.trajectories[g]]) for g in groups]


@dataclass
class Answered:
    """This data-parallel rank's share of a validation.

    Attributes:
        trajectories: [prompts][samples].
        texts: the same, what is said; empty where there is one sample.
        rewards: fp64 [prompts, samples, 2 and more], as `RolloutSampler.rewarded` has them.
    """

    trajectories: list[list[Trajectory]]
    texts: list[list[str]]
    rewards: Tensor


class RolloutSampler:
    """
    Args:
        session: the run.
        source: what samples; one that is read from a file brings rewards, too.
        rewards: without any where environments give them.
        environment: what answers the turns of a response; None: it has one.
        answers: what samples answers to the prompts of a validation; None: the same.
    """

    def __init__(
        self,
        session: Session,
        source: Source,
        rewards: Rewards,
        environment: Named | None = None,
        answers: Source | None = None,
    ):
        self.session, self.source, self.rewards, self.answers = session, source, rewards, answers or source
        self.tools = tool_format(environment, session.inputs.tokenizer)
        self.config: GRPOConfig = session.config
        self.settings = self.config.trainer.grpo
        self.environments = environment and Environments(environment, self.settings.environment_timeout)
        weights = [part.weight for part in rewards.parts]
        data_ranks = parallel_state.get_data_parallel_group()
        self.advantages = AdvantageMaker(self.settings, weights, environment is not None, data_ranks)
        self.context_size = parallel_state.get_context_parallel_world_size()
        session.at_end(rewards.close)
        if self.environments is not None:
            session.at_end(self.environments.close)

    def rollouts(self, prompts: list[Prompt], step: int) -> Rollouts:
        """Of this data-parallel rank's prompts in this step; the same however ranks are laid out."""
        self.has_taken(step - 1)
        requests = self.requests(prompts, step)
        return self.scored(prompts, requests, self.source.sample(requests))

    def requests(self, prompts: list[Prompt], step: int, before: int = 0) -> list[Request]:
        """For the responses that this rank has made in this step, which has sampled so many prompts before."""
        settings = self.settings
        params = settings.sampling(self.session.inputs.tokenizer.stop_ids)
        first = before + self.session.data_rank * len(prompts)
        mine = self._mine(prompts)
        key = self.config.model.seed, step
        given = [p.for_model() for p in prompts[mine]]
        requests = Request.each(given, settings.samples_per_prompt, params, key, first + mine.start)
        return self._with_environments(requests, prompts[mine])

    def scored(self, prompts: list[Prompt], requests: list[Request], trajectories: list[list[Trajectory]]) -> Rollouts:
        """With rewards and advantages. Arguments are those of `rewarded`."""
        return self.valued(prompts, *self.rewarded(prompts, requests, trajectories))

    def rewarded(
        self, prompts: list[Prompt], requests: list[Request], trajectories: list[list[Trajectory]]
    ) -> tuple[list[list[Trajectory]], Tensor]:
        """This data-parallel rank's trajectories, and fp64 [prompts, samples, 2 and more] as `_rewards`; of a file the rewards
        alone.

        Args:
            requests, trajectories: of this rank.
        """
        mine = self._mine(prompts)
        if isinstance(self.source, RecordedSource):
            rewards = torch.tensor(self.source.rewards(requests), dtype=torch.float64, device=self.session.device)
            found = rewards[..., None]
        else:
            found, _ = self._rewards(requests, prompts[mine], trajectories, self.settings.samples_per_prompt)
        trajectories, found, _ = self._from_all_context_ranks(trajectories, found)
        return trajectories, found

    def valued(
        self,
        prompts: list[Prompt],
        trajectories: list[list[Trajectory]],
        found: Tensor,
        numbers: Sequence[int] | None = None,
    ) -> Rollouts:
        """With advantages; every data-parallel rank calls it, with as many prompts. Arguments are what `rewarded` gives."""
        rewards = found[..., 0]
        lengths = [[len(t) for t in group] for group in trajectories]
        lengths = torch.tensor(lengths, dtype=torch.float64, device=rewards.device).view_as(rewards)
        advantages, dropped = self.advantages.advantages(found, lengths)
        known = prompts, trajectories, rewards, advantages, self.advantages.has_signal(found)
        if isinstance(self.source, RecordedSource):
            return Rollouts(*known)
        return Rollouts(*known, self.parts(found), found[..., 1], dropped, numbers)

    def parts(self, found: Tensor) -> Tensor:
        """What each reward said, of what `rewarded` gives: fp64 [prompts, samples, rewards]."""
        return found[..., 2 : 2 + len(self.rewards.parts)]

    def _from_all_context_ranks(
        self, trajectories: list, found: Tensor, texts: Sequence[list[str]] = ()
    ) -> tuple[list, Tensor, list[list[str]]]:
        """Context-parallel ranks train on the same prompts and sample a part of them each."""
        if self.context_size == 1:
            return trajectories, found, list(texts)
        mine = trajectories, found.tolist(), list(texts)
        parts = gather_objects(mine, parallel_state.get_context_parallel_group())
        trajectories, values, texts = ([x for part in parts for x in part[i]] for i in range(3))
        values = torch.tensor(values, dtype=torch.float64, device=self.session.device)
        return trajectories, values.view(len(trajectories), *found.shape[1:]), texts

    def _mine(self, prompts: list[Prompt]) -> slice:
        """Those that this context-parallel rank has sampled."""
        return _share(len(prompts), parallel_state.get_context_parallel_rank(), self.context_size)

    def has_taken(self, steps: int) -> None:
        """The source shall sample with the weights behind so many steps."""
        with self.session.timers("weights"):
            self.source.update_weights(self._version(steps))

    def _version(self, steps: int) -> int:
        """Of the weights behind so many steps."""
        return steps * self.settings.num_prompts_per_grpo_step // self.config.prompts_per_update

    def answered(self, held_out: ValidationSet, step: int) -> Answered:
        """Of this data-parallel rank's share of a set, every `data_size`-th prompt, behind this step; every validation draws the
        same random numbers. Each of its context-parallel ranks asks about a part of it."""
        self.answers.update_weights(self._version(step))
        session, section = self.session, held_out.section
        params = self.settings.validation_sampling(session.inputs.tokenizer.stop_ids, section.sampling_params)
        numbers = range(session.data_rank, len(held_out.prompts), session.data_size)
        prompts = [held_out.prompts[number] for number in numbers]
        key = (self.config.model.seed, VALIDATION - held_out.number)
        mine = self._mine(prompts)
        prompts, given = prompts[mine], zip(prompts[mine], numbers[mine], strict=True)
        requests = [Request(p.for_model(), section.samples, params, (*key, number)) for p, number in given]
        requests = self._with_environments(requests, prompts)
        trajectories = self.answers.sample(requests)
        found, texts = self._rewards(requests, prompts, trajectories, section.samples, with_texts=section.samples > 1)
        trajectories, found, texts = self._from_all_context_ranks(trajectories, found, texts)
        return Answered(trajectories, texts, found)

    def _with_environments(self, requests: list[Request], prompts: list[Prompt]) -> list[Request]:
        if self.environments is None:
            return requests
        tokenizer, limits = self.session.inputs.tokenizer, (self.settings.max_turns, self.settings.on_reward_timeout)
        return [
            replace(
                r, environment=Conversations(self.environments, tokenizer, p, self.tools, r.params.ends, *limits, r.key)
            )
            for r, p in zip(requests, prompts, strict=True)
        ]

    def _rewards(
        self,
        requests: list[Request],
        prompts: list[Prompt],
        trajectories: list[list[Trajectory]],
        samples: int,
        with_texts: bool = False,
    ) -> tuple[Tensor, list[list[str]]]:
        """fp64 [prompts, samples, 2 and more]: the reward, how many did not score the response in time, and each of them, as
        `Rollouts` has them; behind them what the environment gave, where there is one. And [prompts][samples], what is said;
        empty unless asked for. Computed once per model-parallel group and told to its other ranks."""
        group = parallel_state.get_model_parallel_group()
        shape, given = (len(prompts), samples, 2 + len(self.rewards.parts)), self.environments is not None
        rewards = torch.empty((*shape[:2], shape[2] + given), dtype=torch.float64, device=self.session.device)
        texts: list[list[str]] = [[""] * len(group) for group in trajectories]
        with together(group), met_by_all():  # a server may be away for longer than collectives wait
            if group.rank() == 0:
                with PROGRESS.bounded():  # each call has its limit, and so has waiting for a server
                    if self.rewards.parts or with_texts:
                        texts = self._texts(requests, prompts, trajectories)
                    scores = self.rewards.score(texts, prompts)
                values = torch.tensor(scores.table(), dtype=torch.float64).view(shape)
                if given:
                    turns = [[r.environment.reward(i) for i in range(samples)] for r in requests]
                    turns = torch.tensor(turns, dtype=torch.float64).view(len(requests), samples, 1)
                    values[..., :1] += turns
                    values[..., 1] += torch.tensor([[r.environment.lost(i) for i in range(samples)] for r in requests])
                    values = torch.cat((values, turns), -1)
                    with PROGRESS.bounded():
                        _at_once([[partial(r.environment.end, i) for i in range(samples)] for r in requests])
                rewards.copy_(values)
        return broadcast(rewards, 0, group), broadcast_object(texts, 0, group) if with_texts else []

    def _texts(
        self, requests: list[Request], prompts: list[Prompt], trajectories: list[list[Trajectory]]
    ) -> list[list[str]]:
        """Of each prompt the text that each trajectory adds to that of its prompt, or its last turn. An environment is there on
        the first rank of the model-parallel group alone."""
        if self.environments is not None:
            pairs = zip(requests, trajectories, strict=True)
            return _at_once([[partial(r.environment.answer, *each) for each in enumerate(group)] for r, group in pairs])
        return response_texts(self.session.inputs.tokenizer, prompts, trajectories)


def _at_once(groups: Sequence[Sequence[Callable[[], T]]]) -> list[list[T]]:
    """What environments say when all are asked, as many as there are threads at once: one that hangs keeps nobody."""
    asked = [[THREADS.submit(ask) for ask in group] for group in groups]
    try:
        return [[answer.result() for answer in group] for group in asked]
    except BaseException:
        for answer in (answer for group in asked for answer in group):
            answer.cancel()
        raise


def response_texts(
    tokenizer: Tokenizer, prompts: list[Prompt], trajectories: list[list[Trajectory]]
) -> list[list[str]]:
    """Of each prompt the text that each trajectory adds to that of its prompt."""
    pairs = zip(prompts, trajectories, strict=True)
    return [[tokenizer.decode_response(p.tokens, t.tokens) for t in group] for p, group in pairs]


def _share(count: int, rank: int, ranks: int) -> slice:
    """A rank's contiguous part of `count` items, sizes as even as can be."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def in_parts(items: Sequence, size: int | None) -> Iterator[tuple[int, Sequence]]:
    """(number of the first item, that many items), one part after the other; None: all at once."""
    size = size or max(len(items), 1)
    return ((start, items[start : start + size]) for start in range(0, len(items), size))
