"""What a step of supervised fine-tuning learns from: pairs in packed streams, and the loss of their learnt tokens.

Pairs that begin alike are a group, as a prompt with its responses is in GRPO: what they have in common is encoded once, and each
of them learns its own tokens behind it.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.flops import ModelShape
from megatron_ext.grouping import PackedTokens
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import MediaPrompt, pack_prompts
from megatron_ext.packing import pack_groups
from megatron_ext.prefix_tree import PrefixTree
from megatron_ext.runtime.engine import Microbatch
from recipes.data.rows import Pair
from recipes.run.sharing import LEAST_SHARED, SharingChoice
from recipes.sft.settings import SFTModel

__all__ = ["PairGroup", "SFTBatches", "SFTMicrobatch", "negative_log_likelihood"]


@dataclass(frozen=True, kw_only=True)
class SFTMicrobatch(Microbatch):
    """
    Attributes:
        learnt: bool [r], which predicted tokens are learnt.
        global_tokens: learnt tokens of the GLOBAL batch.
    """

    learnt: Tensor
    global_tokens: float


@dataclass(frozen=True)
class PairGroup:
    """Pairs whose prompts have their first tokens in common.

    Attributes:
        shared: how many; of a pair by itself, all of its prompt.
    """

    pairs: tuple[Pair, ...]
    shared: int

    @property
    def prompt(self) -> Sequence[int] | MediaPrompt:
        """What is encoded once."""
        prompt = self.pairs[0].prompt
        return prompt.for_model() if self.shared == len(prompt.tokens) else prompt.tokens[: self.shared]

    @property
    def responses(self) -> list[tuple[int, ...]]:
        """Behind it, of each pair."""
        return [(*pair.prompt.tokens[self.shared :], *pair.response) for pair in self.pairs]

    @property
    def masks(self) -> list[list[bool]]:
        """Which tokens of the responses are learnt."""
        return [
            [False] * (len(pair.prompt.tokens) - self.shared) + [*(pair.learnt or [True] * len(pair.response))]
            for pair in self.pairs
        ]

    @property
    def lengths(self) -> tuple[int, list[int]]:
        return self.shared, [len(response) for response in self.responses]

    def part(self, numbers: Sequence[int]) -> PairGroup:
        """With these of its pairs."""
        return PairGroup(tuple(self.pairs[i] for i in numbers), self.shared)

    def tree(self) -> PrefixTree:
        """With all that they have in common."""
        prompt = self.pairs[0].prompt.tokens[: self.shared]
        return PrefixTree.from_token_lists([[*prompt, *r] for r in self.responses], self.shared, LEAST_SHARED)


class SFTBatches:
    """Packs pairs as `model.micro_batch_size` or `model.micro_batch_tokens` say.

    Args:
        place: of this data-parallel rank: (its number, how many there are).
        sum_over_data: sums over data-parallel ranks.

    Attributes:
        saved: share of the tokens of the last batch that need not be encoded.
    """

    def __init__(
        self,
        model: SFTModel,
        device: torch.device,
        sum_over_data: Callable[..., list[float]],
        place: tuple[int, int] = (0, 1),
    ):
        self.model, self.device, self.sum_over_data = model, device, sum_over_data
        self.rank, self.size = place
        self.saved = 0.0
        self.sharing, self.shape = SharingChoice(model, often=True), ModelShape.of(model)

    @property
    def by_tokens(self) -> bool:
        """Whether what a rank computes is chosen from the pairs of all."""
        return self.model.micro_batch_tokens is not None

    def own(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Of these, as `of` takes them, what this rank computes with."""
        return [pair for cut in self._cuts(pairs)[0] for pair in cut]

    def of(self, pairs: Sequence[Pair]) -> list[SFTMicrobatch]:
        """
        Args:
            pairs: this data-parallel rank's; `by_tokens` all ranks', the same on each of them.
        """
        cuts, prompts = self._cuts(pairs)
        groups, least = self._groups(cuts, prompts)
        count, packed = 0, []
        for cut in groups:
            masks = None if self.model.loss_on_prompt else [mask for group in cut for mask in group.masks]
            batch = self._packed(cut, least)
            packed.append((batch, batch.loss_mask(masks)))
            count += batch.groups.num_predicted_tokens if masks is None else sum(map(sum, masks))
        streams = [batch.groups for batch, _ in packed]
        executed = sum(s.num_tokens - s.num_pad_tokens for s in streams)
        repeated = sum(s.num_repeated_tokens for s in streams)
        tokens, executed, repeated = self.sum_over_data(count, executed, repeated)
        self.saved = 1 - executed / repeated
        return [SFTMicrobatch(batch, learnt=learnt, global_tokens=tokens) for batch, learnt in packed]

    def _packed(self, cut: Sequence[PairGroup], least: int | None) -> PackedTokens:
        model = self.model
        if model.loss_on_prompt:  # one document without a prefix: every token but the first is predicted
            prompts, responses = [() for _ in cut], [[(*p.prompt.tokens, *p.response)] for g in cut for p in g.pairs]
        else:
            prompts, responses = [group.prompt for group in cut], [group.responses for group in cut]
        scheme = model.position_embedding.scheme
        return pack_prompts(prompts, responses, scheme, stream_multiple(model), self.device, min_shared=least)

    def _cuts(self, pairs: Sequence[Pair]) -> tuple[list[Sequence[Pair]], bool | None]:
        """The pairs of each of this rank's streams, and whether they have room there only if they share their prompts."""
        model = self.model
        if not self.by_tokens:
            size = model.micro_batch_size
            return [pairs[start : start + size] for start in range(0, len(pairs), size)], None
        groups, shares = _alone(pairs), False
        if self._may_share:
            alike = _alike(pairs)
            shares = self.sharing.shares_prompts([group.lengths for group in alike])
            groups = alike if shares else groups
        while len(groups) < self.size:  # each rank needs one
            groups.sort(key=lambda group: len(group.pairs))
            largest = groups.pop()
            half = len(largest.pairs) // 2
            groups += [largest.part(range(half)), largest.part(range(half, len(largest.pairs)))]
        lengths = [(0, [len(p.prompt.tokens) + len(p.response) for p in g.pairs]) for g in groups]
        if not model.loss_on_prompt:
            lengths = [group.lengths for group in groups]
        packed = pack_groups(lengths, model.micro_batch_tokens, self.size, self.shape)
        return [[groups[p.group].pairs[i] for p in cut for i in p.responses] for cut in packed[self.rank]], shares

    @property
    def _may_share(self) -> bool:
        return not self.model.loss_on_prompt and self.model.prefix_grouping is not False

    def _groups(self, cuts: Sequence[Sequence[Pair]], prompts: bool | None) -> tuple[list[list[PairGroup]], int | None]:
        """What shares its beginning in each stream, and from how many tokens on beginnings behind that are shared, too.

        Args:
            prompts: see `_cuts`.
        """
        alone = [_alone(cut) for cut in cuts]
        if not self._may_share:
            return alone, None
        beginnings = self.model.min_shared_tokens
        alike = [_alike(cut) for cut in cuts]
        count = sum(map(len, cuts))
        deep = [_alike(cut, beginnings if isinstance(beginnings, int) else LEAST_SHARED) for cut in cuts]
        if sum(map(len, alike)) == sum(map(len, deep)) == count:  # nothing to share
            return alone, None
        trees = (lambda: [g.tree() for cut in deep for g in cut]) if sum(map(len, deep)) < count else None
        shared = self.sharing.choose([g.lengths for cut in alike for g in cut], trees, prompts)
        if shared.beginnings:
            return deep, shared.beginnings
        return (alike if shared.prefix else alone), None


def _alone(pairs: Sequence[Pair]) -> list[PairGroup]:
    return [PairGroup((pair,), len(pair.prompt.tokens)) for pair in pairs]


def _alike(pairs: Sequence[Pair], least: int | None = None) -> list[PairGroup]:
    """Groups in the order of their first pairs.

    Args:
        least: pairs whose prompts have this many first tokens in common are one group; None: those with equal prompts.
    """
    found: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        prompt = pair.prompt
        short = least is None or prompt.media or len(prompt.tokens) < least
        shows = tuple(clip.key for clip in prompt.media)
        key = (shows, prompt.placeholders, prompt.tokens) if short else prompt.tokens[:least]
        found.setdefault(key, []).append(pair)
    return [
        PairGroup(tuple(group), len(os.path.commonprefix([pair.prompt.tokens for pair in group])))
        for group in found.values()
    ]


def negative_log_likelihood(
    microbatch: SFTMicrobatch, logprobs: Tensor, entropy: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The microbatch's part of the mean over the learnt tokens of the global batch."""
    learnt, tokens = microbatch.learnt, microbatch.global_tokens
    loss = -logprobs.where(learnt, 0).sum() / tokens
    return loss, {"loss": loss.detach(), "entropy": entropy.detach().where(learnt, 0).sum() / tokens}
