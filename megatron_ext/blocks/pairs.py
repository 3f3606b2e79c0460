"""The likelihood of either word of a pair behind a prompt, as a prefix group: the prompt once, each word a response.

The log-probabilities that the model gives for such a stream are differentiable and need no logits of the whole
vocabulary, under every kind of parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.grouping import PackedTokens
from megatron_ext.models.config import GPTModelConfig, stream_multiple
from megatron_ext.models.media import pack_prompts

__all__ = ["pack_pairs", "split_pairs"]


def pack_pairs(
    prompts: Sequence[Sequence[int]], pair: tuple[int, int], config: GPTModelConfig, device: torch.device
) -> PackedTokens:
    """One stream in which each prompt is continued by either of two tokens.

    Raises:
        UserError: no prompt, or an empty one, behind which nothing is predicted.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise UserError("a stream of pairs needs prompts, none of them empty")
    responses = [[[token] for token in pair] for _ in prompts]
    return pack_prompts(prompts, responses, config.position_embedding.scheme, stream_multiple(config), device)


def split_pairs(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """[2 n] of such a stream -> log-probabilities of the first and of the second word, [n] each."""
    return logprobs.view(-1, 2).unbind(1)
