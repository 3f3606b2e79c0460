"""Sampling many responses of each prompt: prefill once, share the prompt's keys and values, decode together.

Works under tensor, sequence and pipeline parallelism: every rank of a model-parallel group calls `generate` with the
same arguments and gets the same tokens.

Shape legend: t prompt tokens in the packed stream, r responses, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ext.attention.cache import DecodeStep, PrefillStep, SharedPrefixCache
from megatron_ext.errors import UserError
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.media import MediaPrompt, next_position, pack_prompts
from megatron_ext.models.prompt_streams import check_lengths, from_last_stage, run_stage

__all__ = ["SamplingParams", "UniformDraws", "choose_tokens", "generate"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. NeMo-Aligner's names.

    temperature, top_k and top_p filter in this order; top_k = 0 and top_p = 1 filter nothing. `use_greedy` takes the
    most likely token.
    """

    max_new_tokens: int
    stop_token_id: int | None = None
    use_greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        rules = [
            (self.max_new_tokens < 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}"),
            (self.temperature <= 0, f"temperature must be positive, got {self.temperature}; use use_greedy for greedy"),
            (self.top_k < 0, f"top_k must not be negative, got {self.top_k}"),
            (not 0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}"),
        ]
        for broken, message in rules:
            if broken:
                raise UserError(message)


class UniformDraws:
    """The random numbers behind sampling: one uniform per response and token.

    Drawn for the responses of ALL data-parallel ranks and then sliced, so that the same seed samples the same
    responses however they are spread over ranks.
    """

    def __init__(self, seed: int | tuple[int, ...], first: int = 0, total: int | None = None):
        # SeedSequence mixes all of a tuple, e.g. (seed, step): torch's generator reads 32 bits of its seed alone.
        mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(mixed)
        self.first, self.total = first, total

    def next(self, count: int) -> Tensor:
        """fp64 [count] in [0, 1)."""
        total = self.first + count if self.total is None else self.total
        return torch.rand(total, generator=self.generator, dtype=torch.float64)[self.first : self.first + count]


def choose_tokens(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution.

    Args:
        logits: fp32 [r, v].
        uniform: fp64 [r] in [0, 1).

    Returns:
        int64 [r].
    """
    if params.use_greedy:
        return logits.argmax(-1)
    logits = logits / params.temperature
    if 0 < params.top_k < logits.size(1):
        threshold = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        outside = probability.cumsum(-1) - probability >= params.top_p  # the most likely token always stays
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    cumulative = logits.double().softmax(-1).cumsum(-1)
    point = uniform.to(logits.device).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp_(max=logits.size(1) - 1)


@torch.no_grad()
def generate(
    model: PrefixGroupedGPT,
    prompts: Sequence[Sequence[int] | MediaPrompt],
    samples_per_prompt: int,
    params: SamplingParams,
    draws: UniformDraws,
) -> list[list[list[int]]]:
    """Sample `samples_per_prompt` responses of every prompt.

    Args:
        model: this rank's pipeline stage, without a DDP wrapper.
        prompts: token ids, or prompts with media; none empty.

    Returns:
        For each prompt its responses; each ends with the stop token, or was cut at `max_new_tokens`.

    Raises:
        UserError: an empty prompt, or prompt plus response longer than the model's `encoder_seq_length`.
    """
    check_lengths(model, prompts, params.max_new_tokens)
    device = next(model.parameters()).device
    multiple = stream_multiple(model.model_config)
    scheme = model.model_config.position_embedding.scheme
    batch = pack_prompts(prompts, [[] for _ in prompts], scheme, multiple, device)
    cache = SharedPrefixCache(batch.groups, samples_per_prompt, params.max_new_tokens)
    ends = torch.tensor([s.start + s.length - 1 for s in batch.groups.segments], device=device)
    first_position = torch.tensor([next_position(p, scheme) for p in prompts], device=device)
    first_position = first_position.repeat_interleave(samples_per_prompt)

    logits = run_stage(model, batch.tokens, batch.position_ids, PrefillStep(cache), ends, batch.media)
    if logits is not None:
        logits = logits.repeat_interleave(samples_per_prompt, 0)  # [r, v]
    columns: list[Tensor] = []
    finished = torch.zeros(cache.num_responses, dtype=torch.bool, device=device)
    padded = cache.num_responses + -cache.num_responses % multiple
    rows = torch.arange(cache.num_responses, device=device)
    for index in range(params.max_new_tokens):
        tokens = _agree_on_tokens(logits, params, draws, cache.num_responses, device)
        columns.append(tokens)
        if params.stop_token_id is not None:
            finished |= tokens == params.stop_token_id
        if index + 1 == params.max_new_tokens or bool(finished.all()):
            break
        step_tokens, step_positions = tokens.new_zeros(padded), tokens.new_zeros(padded)
        step_tokens[: len(tokens)], step_positions[: len(tokens)] = tokens, first_position + index
        logits = run_stage(model, step_tokens, step_positions, DecodeStep(cache, index), rows)
    responses = [_until_stop(r, params.stop_token_id) for r in torch.stack(columns, 1).tolist()]
    return [responses[i : i + samples_per_prompt] for i in range(0, len(responses), samples_per_prompt)]


def _until_stop(tokens: list[int], stop: int | None) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def _agree_on_tokens(
    logits: Tensor | None, params: SamplingParams, draws: UniformDraws, count: int, device: torch.device
) -> Tensor:
    """Sample on the last stage and tell the other ranks. Every rank draws, so that the generators stay in step.

    One rank decides for all, its tensor-parallel peers included: a cumulative sum on a GPU need not be the same twice,
    and ranks that disagree about one token would wait for each other for ever.
    """
    uniform = draws.next(count)
    tokens = None if logits is None else choose_tokens(logits, params, uniform)
    return from_last_stage(tokens, (count,), device, torch.int64)
