"""What a GRPO step learns from: responses of every prompt, sampled by the policy, and what they are worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.overlong import overlong_penalty
from megatron_ext.rollouts import Request, Source, Trajectory
from megatron_ext.runtime.collectives import broadcast, gather_objects, gather_rows, together
from megatron_ext.runtime.progress import PROGRESS
from recipes.data.rows import Prompt
from recipes.data.tokenizer import Tokenizer
from recipes.environments.registry import Named
from recipes.grpo.choices import get_advantages
from recipes.grpo.conversations import Conversations, tool_format
from recipes.grpo.recorded import RecordedSource
from recipes.grpo.settings import GRPOConfig
from recipes.grpo.validation import ValidationSet
from recipes.rewards.several import Rewards
from recipes.run.session import Session

__all__ = ["Answered", "RolloutSampler", "Rollouts", "in_parts", "response_texts"]

# In place of a step's number in the random numbers of a validation: no step has it.
VALIDATION = 2**32 - 1


@dataclass
class Rollouts:
    """This data-parallel rank's share of one step.

    Attributes:
        trajectories: [prompts][g], what followed.
        rewards: fp64 [prompts, g]; NaN where a reward did not score a response in time, which drops its group.
        advantages: fp64 [prompts, g]; 0 in groups that are dropped.
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
        rewards: fp64 [prompts, samples, 2 + rewards], as `RolloutSampler` has them.
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
        self.environment, self.tools = environment, tool_format(environment, session.inputs.tokenizer)
        self.config: GRPOConfig = session.config
        self.settings = self.config.trainer.grpo
        self.context_size = parallel_state.get_context_parallel_world_size()
        session.at_end(rewards.close)

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
        """This data-parallel rank's trajectories, and fp64 [prompts, samples, 2 + rewards] as `_rewards`; of a file the rewards
        alone.

        Args:
            requests, trajectories: of this rank.
        """
        mine = self._mine(prompts)
        if isinstance(self.source, RecordedSource):
            rewards = torch.tensor(self.source.rewards(requests), dtype=torch.float64, device=self.session.device)
            found = rewards[..., None]
        else:
            found = self._rewards(requests, prompts[mine], trajectories, self.settings.samples_per_prompt)
        return self._from_all_context_ranks(trajectories, found)

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
        longest, buffer = self.settings.length_params.max_length, self.settings.overlong_buffer
        advantages, dropped = self._advantages(rewards + overlong_penalty(lengths, longest, buffer))
        if isinstance(self.source, RecordedSource):
            return Rollouts(prompts, trajectories, rewards, advantages)
        more = found[..., 2:], found[..., 1], dropped, numbers
        return Rollouts(prompts, trajectories, rewards, advantages, *more)

    def _advantages(self, rewards: Tensor) -> tuple[Tensor, list[bool]]:
        """Of this data-parallel rank's rewards, [prompts, samples], which may ask all of the step; and which groups are dropped,
        because a reward is not known: they have advantages of 0, and no others ask them."""
        everybodys = known = gather_rows(rewards, parallel_state.get_data_parallel_group())
        drops = self.settings.on_reward_timeout == "drop"
        if drops:
            lacks = everybodys.isnan().any(1)
            known = everybodys[~lacks]
        found = get_advantages(self.settings.chosen)(known) if len(known) else known
        if found.shape != known.shape:
            raise UserError(
                f"trainer.grpo.objective.advantages={self.settings.objective['advantages']} gave {tuple(found.shape)} for "
                f"rewards of {tuple(known.shape)}: it must give one for each"
            )
        first = self.session.data_rank * len(rewards)
        mine = slice(first, first + len(rewards))
        if not drops:
            return found[mine].double(), []
        advantages = torch.zeros_like(everybodys, dtype=torch.float64)
        advantages[~lacks] = found.double()
        return advantages[mine], lacks[mine].tolist()

    def _from_all_context_ranks(self, trajectories: list, found: Tensor) -> tuple[list, Tensor]:
        """Context-parallel ranks train on the same prompts and sample a part of them each."""
        if self.context_size == 1:
            return trajectories, found
        parts = gather_objects((trajectories, found.tolist()), parallel_state.get_context_parallel_group())
        trajectories = [t for part, _ in parts for t in part]
        values = [r for _, part in parts for r in part]
        return trajectories, torch.tensor(values, dtype=torch.float64, device=self.session.device)

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
        same random numbers."""
        self.answers.update_weights(self._version(step))
        session, section = self.session, held_out.section
        params = self.settings.validation_sampling(session.inputs.tokenizer.stop_ids, section.sampling_params)
        numbers = range(session.data_rank, len(held_out.prompts), session.data_size)
        prompts = [held_out.prompts[number] for number in numbers]
        key = (self.config.model.seed, VALIDATION - held_out.number)
        given = zip(prompts, numbers, strict=True)
        requests = [Request(p.for_model(), section.samples, params, (*key, number)) for p, number in given]
        requests = self._with_environments(requests, prompts)
        trajectories = self.answers.sample(requests)
        texts = self._texts(requests, prompts, trajectories) if section.samples > 1 else []
        return Answered(trajectories, texts, self._rewards(requests, prompts, trajectories, section.samples))

    def _with_environments(self, requests: list[Request], prompts: list[Prompt]) -> list[Request]:
        if self.environment is None:
            return requests
        tokenizer, turns = self.session.inputs.tokenizer, self.settings.max_turns
        return [
            replace(r, environment=Conversations(self.environment, tokenizer, p, self.tools, r.params.ends, turns))
            for r, p in zip(requests, prompts, strict=True)
        ]

    def _rewards(
        self, requests: list[Request], prompts: list[Prompt], trajectories: list[list[Trajectory]], samples: int
    ) -> Tensor:
        """fp64 [prompts, samples, 2 + rewards]: the reward, how many did not score the response in time, and each of them, as
        `Rollouts` has them; computed once per model-parallel group and told to its other ranks."""
        group = parallel_state.get_model_parallel_group()
        shape = len(prompts), samples, 2 + len(self.rewards.parts)
        rewards = torch.empty(shape, dtype=torch.float64, device=self.session.device)
        with together(group):
            if group.rank() == 0:
                with PROGRESS.bounded():  # each call has its limit, and so has waiting for a server
                    scores = self.rewards.score(self._answers(requests, prompts, trajectories), prompts)
                values = torch.tensor(scores.table(), dtype=torch.float64).view(shape)
                if self.environment is not None:
                    given = [[r.environment.reward(i) for i in range(samples)] for r in requests]
                    values[..., 0] += torch.tensor(given, dtype=torch.float64).view(len(requests), samples)
                rewards.copy_(values)
                for conversations in (r.environment for r in requests if r.environment is not None):
                    conversations.close()
        return broadcast(rewards, 0, group)

    def _answers(
        self, requests: list[Request], prompts: list[Prompt], trajectories: list[list[Trajectory]]
    ) -> list[list[str]]:
        """What a reward reads, of each prompt: the text that each trajectory adds to that of its prompt, or its last turn."""
        if not self.rewards.parts:
            return [[""] * len(group) for group in trajectories]
        return self._texts(requests, prompts, trajectories)

    def _texts(
        self, requests: list[Request], prompts: list[Prompt], trajectories: list[list[Trajectory]]
    ) -> list[list[str]]:
        if self.environment is not None:
            pairs = zip(requests, trajectories, strict=True)
            return [[r.environment.answer(i, t) for i, t in enumerate(group)] for r, group in pairs]
        return response_texts(self.session.inputs.tokenizer, prompts, trajectories)


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
