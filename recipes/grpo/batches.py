"""What a GRPO step is trained on: rollouts, packed into the microbatches of every optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.flops import ModelShape
from megatron_ext.grouping.routes import Routes, stream_routes
from megatron_ext.losses.high_entropy import high_entropy_tokens
from megatron_ext.losses.objective import token_weights
from megatron_ext.losses.off_policy import rejected_responses
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.packing import Part, pack_groups, saving_kept
from megatron_ext.rollouts import Trajectory
from megatron_ext.runtime.collectives import gather_objects, sum_of_all
from megatron_ext.runtime.engine import Microbatch
from recipes.grpo.rollouts import Rollouts, in_parts
from recipes.grpo.settings import GRPOConfig
from recipes.grpo.sharing import Sharing
from recipes.run.session import Session
from recipes.run.sharing import Shared

__all__ = ["BatchMaker", "GRPOMicrobatch"]


@dataclass(frozen=True, kw_only=True)
class GRPOMicrobatch(Microbatch):
    """
    Attributes:
        advantages: [r], of each predicted token's response.
        weights: [r], see `token_weights`.
        sampled_logprobs: [r], as the sampler said them, 0 for tokens that were not sampled, NaN where it is not known;
            None: nothing compares with them.
        old_logprobs: [r], of the policy that sampled; None: it is the one that is trained, whose update says them.
        ref_logprobs: [r], of the initial policy; None where there is no KL penalty.
        entropies: [r], of the policy that sampled; None where nobody asks.
        kept: bool [r], tokens that the objective trains; None: all.
        numbers: for each response of the stream (its prompt's number in the step, its own among the prompt's samples).
    """

    advantages: Tensor
    weights: Tensor
    sampled_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropies: Tensor | None = None
    kept: Tensor | None = None
    numbers: Sequence[tuple[int, int]] = ()


class BatchMaker:
    """Packs rollouts as `model.micro_batch_size` or `model.micro_batch_tokens` say, and weighs their tokens.

    Args:
        session: the run.
    """

    def __init__(self, session: Session):
        self.session = session
        self.config: GRPOConfig = session.config
        self.settings = self.config.trainer.grpo
        self.shape = ModelShape.of(self.config.model)
        self.local_prompts = self.settings.num_prompts_per_grpo_step // session.data_size
        self.local_update_prompts = self.config.prompts_per_update // session.data_size
        constant = float(self.config.model.global_batch_size * self.settings.length_params.max_length)
        self.normalisation = self.settings.chosen.normalisation, constant
        self.sharing = Sharing(self.config.model)

    def updates(self, rollouts: Rollouts) -> tuple[list[list[GRPOMicrobatch]], dict[str, float]]:
        """The microbatches of each optimizer step on this rank, and what their packing is worth."""
        model = self.config.model
        if model.micro_batch_tokens is None:
            updates = []
            for first in range(0, self.local_prompts, self.local_update_prompts):
                groups = range(first, first + self.local_update_prompts)
                parts = [Part(g, tuple(range(self.settings.samples_per_prompt))) for g in groups]
                cuts = [cut for _, cut in in_parts(parts, model.micro_batch_size)]
                shared, before = self.sharing.of(rollouts, groups), self.session.data_rank * self.local_prompts
                updates.append(self._microbatches(rollouts, cuts, shared, before))
            return updates, {}
        everything, data = self._from_all_data_ranks(rollouts), self.session
        count = self.local_update_prompts * data.data_size
        updates, kept = [], []
        for first in range(0, len(everything.prompts), count):
            groups = range(first, first + count)
            shared, lengths = self.sharing.of(everything, groups), everything.lengths(groups)
            packed = pack_groups(lengths, model.micro_batch_tokens, data.data_size, self.shape, shared.prefix)
            cuts = [[Part(first + p.group, p.responses) for p in cut] for cut in packed[data.data_rank]]
            updates.append(self._microbatches(everything, cuts, shared))
            if shared.prefix:
                kept.append(saving_kept(lengths, [cut for rank in packed for cut in rank]))
        return updates, {"train_optim/saving_kept": sum(kept) / len(kept)} if kept else {}

    def _from_all_data_ranks(self, rollouts: Rollouts) -> Rollouts:
        """Everybody's rollouts, in the order of ranks, so that work can be spread anew."""
        mine = (
            rollouts.prompts, rollouts.trajectories, rollouts.rewards.tolist(), rollouts.advantages.tolist(), rollouts.dropped
        )  # fmt: skip
        parts = gather_objects(mine, parallel_state.get_data_parallel_group())
        prompts, trajectories, rewards, advantages, dropped = ([x for part in parts for x in part[i]] for i in range(5))
        rewards, advantages = (
            torch.tensor(x, dtype=torch.float64, device=self.session.device) for x in (rewards, advantages)
        )
        return Rollouts(prompts, trajectories, rewards, advantages, dropped=dropped)

    def _microbatches(
        self, rollouts: Rollouts, cuts: list[list[Part]], shared: Shared, before: int = 0
    ) -> list[GRPOMicrobatch]:
        """A stream for each cut, each token weighted by the counts of the GLOBAL batch.

        Args:
            before: prompts of the step before these rollouts.
        """
        model = self.config.model
        batches, masks, said = [], [], []
        for cut in cuts:
            found = [[rollouts.trajectories[p.group][i] for i in p.responses] for p in cut]
            batches.append(
                pack_prompts(
                    [rollouts.prompts[p.group].for_model() for p in cut],
                    [[t.tokens for t in group] for group in found],
                    model.position_embedding.scheme,
                    stream_multiple(model),
                    self.session.device,
                    share_prefix=shared.prefix,
                    min_shared=shared.beginnings,
                )
            )
            dropped = [bool(rollouts.dropped) and rollouts.dropped[p.group] for p in cut]
            masks.append([self._trained(t, left) for group, left in zip(found, dropped, strict=True) for t in group])
            said.append(batches[-1].predicted([t.logprobs for group in found for t in group], torch.float32))
            if self.settings.router_replay == "R3":
                routes, shape = [t.routes for group in found for t in group], model.route_shape
                Routes.given(batches[-1].groups, stream_routes(batches[-1].groups, routes, shape.layers, shape.topk))
        counted = [
            sum(mask) for part in masks for mask in part if any(mask)
        ]  # prompts are never empty: all are predicted
        tokens, responses = self.session.sum_over_data(sum(counted), len(counted))
        microbatches = []
        for cut, batch, mask, sampled in zip(cuts, batches, masks, said, strict=True):
            ids, count = batch.groups.response_ids, batch.groups.num_responses
            advantages = torch.stack([rollouts.advantages[p.group, i] for p in cut for i in p.responses])
            microbatches.append(
                GRPOMicrobatch(
                    batch,
                    self.settings.sampling_params.temperature,
                    advantages=advantages[ids].float(),
                    weights=token_weights(ids, batch.loss_mask(mask), count, tokens, responses, *self.normalisation),
                    sampled_logprobs=sampled,
                    numbers=[(before + p.group, i) for p in cut for i in p.responses],
                )
            )
        return microbatches

    def without_rejected(
        self, updates: list[list[GRPOMicrobatch]], above: float
    ) -> tuple[list[list[GRPOMicrobatch]], float]:
        """Leave out responses that the sampler and the trainer see too differently (`rejected_responses`): their tokens count
        neither in the loss nor in its normaliser. Returns the microbatches and the share of responses that was left out."""
        kept, left, everything = [], 0, 0
        for microbatches in updates:
            masks, sums = [], []
            for m in microbatches:
                ids, k, counts = m.batch.groups.response_ids, m.batch.groups.num_responses, m.weights > 0
                rejected = rejected_responses(m.old_logprobs, m.sampled_logprobs, counts, ids, k, above)
                masks.append(counts & ~rejected[ids])
                sums.append(torch.stack([masks[-1].sum(), _responses(masks[-1], ids, k), _responses(counts, ids, k)]))
            tokens, responses, before = self.session.sum_over_data(*torch.stack(sums).sum(0).tolist())
            weighed = zip(microbatches, masks, strict=True)
            kept.append([self._weighed(m, mask, tokens, responses) for m, mask in weighed])
            left, everything = left + responses, everything + before
        return kept, 1 - left / max(everything, 1)

    def of_high_entropy(self, microbatches: list[GRPOMicrobatch], share: float) -> list[GRPOMicrobatch]:
        """An optimizer step's microbatches, of which the objective trains that share of tokens."""
        add = partial(sum_of_all, group=parallel_state.get_data_parallel_group())
        kept = high_entropy_tokens(
            [m.entropies for m in microbatches], [m.weights > 0 for m in microbatches], share, add
        )
        return [replace(m, kept=tokens) for m, tokens in zip(microbatches, kept, strict=True)]

    def _weighed(self, microbatch: GRPOMicrobatch, mask: Tensor, tokens: float, responses: float) -> GRPOMicrobatch:
        groups = microbatch.batch.groups
        counts = groups.num_responses, tokens, responses
        weights = token_weights(groups.response_ids, mask, *counts, *self.normalisation)
        return replace(microbatch, weights=weights)

    def _trained(self, trajectory: Trajectory, dropped: bool) -> list[bool]:
        """For each token whether it is trained: those sampled, unless their trajectory was cut off and such are left out, or
        their group is dropped."""
        left_out = dropped or self.settings.overlong_filtering and trajectory.truncated
        return [sampled and not left_out for sampled in trajectory.mask]


def _responses(mask: Tensor, ids: Tensor, count: int) -> Tensor:
    """How many responses have a token in a mask [r]; int64 []."""
    return mask.new_zeros(count, dtype=torch.int64).index_add(0, ids, mask.long()).gt(0).sum()
