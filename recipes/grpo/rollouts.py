"""What a GRPO step learns from: responses of every prompt, sampled by the policy, and what they are worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.losses.grpo import group_advantages
from megatron_ext.models.generation import SamplingParams, UniformDraws, generate
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.collectives import broadcast, gather_objects, together
from recipes.data.rows import Prompt
from recipes.data.tokenizer import Tokenizer
from recipes.grpo.rewards import Reward, score
from recipes.grpo.settings import GRPOConfig
from recipes.run.session import Session

__all__ = ["RolloutSampler", "Rollouts", "in_parts", "response_texts"]


@dataclass
class Rollouts:
    """This data-parallel rank's share of one step: prompts, their responses, rewards and advantages [prompts, g], fp64."""

    prompts: list[Prompt]
    responses: list[list[list[int]]]
    rewards: Tensor
    advantages: Tensor

    def lengths(self, groups: Sequence[int]) -> list[tuple[int, list[int]]]:
        """(prompt length, [response lengths]) of these groups."""
        return [(len(self.prompts[g].tokens), [len(r) for r in self.responses[g]]) for g in groups]


class RolloutSampler:
    """
    Args:
        session: the run.
        model: the policy, this rank's pipeline stage.
        reward: see `recipes.grpo.rewards`.
    """

    def __init__(self, session: Session, model: PrefixGroupedGPT, reward: Reward):
        self.session, self.model, self.reward = session, model, reward
        self.config: GRPOConfig = session.config
        self.settings = self.config.trainer.grpo
        self.context_size = parallel_state.get_context_parallel_world_size()

    def rollouts(self, prompts: list[Prompt], step: int) -> Rollouts:
        """Of this data-parallel rank's prompts in this step; the same however ranks are laid out."""
        settings = self.settings
        params = settings.sampling(self.session.inputs.tokenizer.eos_id)
        g, first = settings.samples_per_prompt, self.session.data_rank * len(prompts)
        mine = _share(len(prompts), parallel_state.get_context_parallel_rank(), self.context_size)
        responses = []
        for start, part in in_parts(prompts[mine], settings.rollout_micro_batch_size):
            draws = UniformDraws(
                seed=(self.config.model.seed, step),
                first=(first + mine.start + start) * g,
                total=settings.num_prompts_per_grpo_step * g,
            )
            responses += generate(self.model, [p.for_model() for p in part], g, params, draws)
        rewards = self._rewards(prompts[mine], responses)
        responses, rewards = self._from_all_context_ranks(responses, rewards)
        advantages = group_advantages(rewards, settings.normalize_rewards, settings.use_leave_one_out_baseline)
        return Rollouts(prompts, responses, rewards, advantages)

    def _from_all_context_ranks(self, responses: list, rewards: Tensor) -> tuple[list, Tensor]:
        """Context-parallel ranks train on the same prompts and sample a part of them each."""
        if self.context_size == 1:
            return responses, rewards
        parts = gather_objects((responses, rewards.tolist()), parallel_state.get_context_parallel_group())
        responses = [r for part, _ in parts for r in part]
        rewards = [r for _, part in parts for r in part]
        return responses, torch.tensor(rewards, dtype=torch.float64, device=self.session.device)

    def greedy_rewards(self, prompts: list[Prompt]) -> Tensor:
        """fp64 [prompts, 1]: of the likeliest answers."""
        params = SamplingParams(
            self.settings.length_params.max_length, self.session.inputs.tokenizer.eos_id, use_greedy=True
        )
        rewards = [torch.empty(0, 1, dtype=torch.float64, device=self.session.device)]
        for _, part in in_parts(prompts, self.settings.rollout_micro_batch_size):
            answers = generate(self.model, [p.for_model() for p in part], 1, params, UniformDraws(0))
            rewards.append(self._rewards(part, answers))
        return torch.cat(rewards)

    def _rewards(self, prompts: list[Prompt], responses: list[list[list[int]]]) -> Tensor:
        """Rewards [prompts, samples] in fp64, computed once per model-parallel group and told to its other ranks."""
        samples = len(responses[0]) if responses else self.settings.samples_per_prompt
        group = parallel_state.get_model_parallel_group()
        rewards = torch.empty(len(prompts), samples, dtype=torch.float64, device=self.session.device)
        with together(group):
            if group.rank() == 0:
                texts = response_texts(self.session.inputs.tokenizer, prompts, responses)
                rows = [p.row for p in prompts for _ in range(samples)]
                values = score(self.reward, texts, rows)
                rewards.copy_(torch.tensor(values, dtype=torch.float64).view_as(rewards))
        return broadcast(rewards, 0, group)


def response_texts(tokenizer: Tokenizer, prompts: list[Prompt], responses: list[list[list[int]]]) -> list[str]:
    """What a reward reads, prompt by prompt: the text that each response adds to that of its prompt."""
    pairs = zip(prompts, responses, strict=True)
    return [tokenizer.decode_response(p.tokens, response) for p, group in pairs for response in group]


def _share(count: int, rank: int, ranks: int) -> slice:
    """A rank's contiguous part of `count` items, sizes as even as can be."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def in_parts(items: Sequence, size: int | None) -> Iterator[tuple[int, Sequence]]:
    """(number of the first item, that many items), one part after the other; None: all at once."""
    size = size or max(len(items), 1)
    return ((start, items[start : start + size]) for start in range(0, len(items), size))
