"""What a GRPO step is trained on: rollouts, packed into the microbatches of every optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.flops import ModelShape, ideal_speedup, sharing_pays
from megatron_ext.losses.grpo import token_weights
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.packing import Part, pack_groups, saving_kept
from megatron_ext.runtime.engine import Microbatch
from recipes.data.rows import Prompt
from recipes.grpo.settings import GRPOConfig
from recipes.run.session import Session
from recipes.run.settings import check_batch_sizes

__all__ = ["BatchMaker", "Rollouts", "in_parts"]

logger = logging.getLogger(__name__)


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


class BatchMaker:
    """Packs rollouts as `model.micro_batch_size` or `model.micro_batch_tokens` say, and weighs their tokens.

    Args:
        session: the run.

    Raises:
        UserError: batch sizes that do not divide each other.
    """

    def __init__(self, session: Session):
        self.session = session
        self.config: GRPOConfig = session.config
        self.settings = self.config.trainer.grpo
        self.shape = ModelShape.of(self.config.model)
        self.local_prompts = check_batch_sizes(
            "trainer.grpo.num_prompts_per_grpo_step", self.settings.num_prompts_per_grpo_step, session.data_size
        )
        self.local_update_prompts = check_batch_sizes(
            "the prompts of an optimizer step (model.global_batch_size / trainer.grpo.samples_per_prompt)",
            self.config.model.global_batch_size // self.settings.samples_per_prompt,
            session.data_size,
        )
        self._shared_last: bool | None = None

    def updates(self, rollouts: Rollouts) -> tuple[list[list[Microbatch]], dict[str, float]]:
        """The microbatches of each optimizer step on this rank, and what their packing is worth."""
        model = self.config.model
        if model.micro_batch_tokens is None:
            updates = []
            for first in range(0, self.local_prompts, self.local_update_prompts):
                groups = range(first, first + self.local_update_prompts)
                parts = [Part(g, tuple(range(self.settings.samples_per_prompt))) for g in groups]
                cuts = [cut for _, cut in in_parts(parts, model.micro_batch_size)]
                updates.append(self._microbatches(rollouts, cuts, self._shares_prefix(rollouts.lengths(groups))))
            return updates, {}
        everything, data = self._from_all_data_ranks(rollouts), self.session
        count = self.local_update_prompts * data.data_size
        updates, kept = [], []
        for first in range(0, len(everything.prompts), count):
            lengths = everything.lengths(range(first, first + count))
            share = self._shares_prefix(lengths)
            packed = pack_groups(lengths, model.micro_batch_tokens, data.data_size, self.shape, share)
            cuts = [[Part(first + p.group, p.responses) for p in cut] for cut in packed[data.data_rank]]
            updates.append(self._microbatches(everything, cuts, share))
            if share:
                kept.append(saving_kept(lengths, [cut for rank in packed for cut in rank]))
        return updates, {"train_optim/saving_kept": sum(kept) / len(kept)} if kept else {}

    def _shares_prefix(self, lengths: list[tuple[int, list[int]]]) -> bool:
        """model.prefix_grouping, and for "auto" what the operations promise; a changed choice is logged."""
        setting = self.config.model.prefix_grouping
        if setting != "auto":
            return setting
        if self.config.model.min_shared_tokens is not None:
            return True  # asked for, and what a tree saves is not told by these lengths
        share = sharing_pays(self.shape, lengths)
        if share != self._shared_last:
            logger.info(
                "prefix grouping is %s: counting operations it is %.2f times as fast",
                "on" if share else "off",
                ideal_speedup(self.shape, lengths),
            )
            self._shared_last = share
        return share

    def _from_all_data_ranks(self, rollouts: Rollouts) -> Rollouts:
        """Everybody's rollouts, in the order of ranks, so that work can be spread anew."""
        parts: list = [None] * self.session.data_size
        mine = (rollouts.prompts, rollouts.responses, rollouts.rewards.tolist(), rollouts.advantages.tolist())
        dist.all_gather_object(parts, mine, group=parallel_state.get_data_parallel_group())
        prompts, responses, rewards, advantages = ([x for part in parts for x in part[i]] for i in range(4))
        rewards, advantages = (
            torch.tensor(x, dtype=torch.float64, device=self.session.device) for x in (rewards, advantages)
        )
        return Rollouts(prompts, responses, rewards, advantages)

    def _microbatches(self, rollouts: Rollouts, cuts: list[list[Part]], share_prefix: bool) -> list[Microbatch]:
        """A stream for each cut, each token weighted by the counts of the GLOBAL batch."""
        settings, device = self.settings, self.session.device
        microbatches, masks = [], []
        for cut in cuts:
            responses = [[rollouts.responses[p.group][i] for i in p.responses] for p in cut]
            batch = pack_prompts(
                [rollouts.prompts[p.group].for_model() for p in cut],
                responses,
                self.config.model.position_embedding.scheme,
                stream_multiple(self.config.model),
                device,
                share_prefix=share_prefix,
                min_shared=self.config.model.min_shared_tokens if share_prefix else None,
            )
            advantages = torch.stack([rollouts.advantages[p.group, i] for p in cut for i in p.responses])
            extra = {"advantages": advantages[batch.groups.response_ids].float()}
            microbatches.append(Microbatch(batch, settings.sampling_params.temperature, extra))
            masks.append([[self._trained(r)] * len(r) for rs in responses for r in rs])
        counted = [mask for part in masks for mask in part if any(mask)]  # prompts are never empty: all are predicted
        tokens, responses = self.session.sum_over_data(sum(map(len, counted)), len(counted))
        level = "token" if settings.token_level_loss else "sequence"
        for microbatch, part in zip(microbatches, masks, strict=True):
            groups, mask = microbatch.batch.groups, microbatch.batch.loss_mask(part)
            microbatch.extra["weights"] = token_weights(
                groups.response_ids, mask, groups.num_responses, tokens, responses, level
            )
        return microbatches

    def _trained(self, response: list[int]) -> bool:
        return self.ended(response) or not self.settings.overlong_filtering

    def ended(self, response: list[int]) -> bool:
        """Whether it ended by itself, and was not cut at `length_params.max_length`."""
        return response[-1] == self.session.tokenizer.eos_id


def in_parts(items: Sequence, size: int | None) -> Iterator[tuple[int, Sequence]]:
    """(number of the first item, that many items), one part after the other; None: all at once."""
    size = size or max(len(items), 1)
    return ((start, items[start : start + size]) for start in range(0, len(items), size))
