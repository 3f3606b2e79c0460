"""What a step of supervised fine-tuning learns from: pairs in packed streams, and the loss of their learnt tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.runtime.engine import Microbatch
from recipes.data.rows import Pair
from recipes.sft.settings import SFTModel

__all__ = ["SFTMicrobatch", "make_microbatches", "negative_log_likelihood"]


@dataclass(frozen=True, kw_only=True)
class SFTMicrobatch(Microbatch):
    """
    Attributes:
        learnt: bool [r], which predicted tokens are learnt.
        global_tokens: learnt tokens of the GLOBAL batch.
    """

    learnt: Tensor
    global_tokens: float


def make_microbatches(
    pairs: list[Pair], model: SFTModel, device: torch.device, sum_over_data: Callable[[float], list[float]]
) -> list[SFTMicrobatch]:
    """Streams of `micro_batch_size` samples.

    Args:
        pairs: this data-parallel rank's.
        sum_over_data: sums over data-parallel ranks.
    """
    packed, count = [], 0
    for start in range(0, len(pairs), model.micro_batch_size):
        part = pairs[start : start + model.micro_batch_size]
        if model.loss_on_prompt:  # one document without a prefix: every token but the first is predicted
            prompts, responses = [() for _ in part], [[p.prompt.tokens + p.response] for p in part]
            masks = None
        else:
            prompts, responses = [p.prompt.for_model() for p in part], [[p.response] for p in part]
            masks = [p.learnt or [True] * len(p.response) for p in part]
        batch = pack_prompts(prompts, responses, model.position_embedding.scheme, stream_multiple(model), device)
        packed.append((batch, batch.loss_mask(masks)))
        count += batch.groups.num_predicted_tokens if masks is None else sum(p.num_learnt for p in part)
    (tokens,) = sum_over_data(count)
    return [SFTMicrobatch(batch, learnt=learnt, global_tokens=tokens) for batch, learnt in packed]


def negative_log_likelihood(
    microbatch: SFTMicrobatch, logprobs: Tensor, entropy: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The microbatch's part of the mean over the learnt tokens of the global batch."""
    learnt, tokens = microbatch.learnt, microbatch.global_tokens
    loss = -logprobs.where(learnt, 0).sum() / tokens
    return loss, {"loss": loss.detach(), "entropy": entropy.detach().where(learnt, 0).sum() / tokens}
