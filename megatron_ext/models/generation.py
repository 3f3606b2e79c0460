"""Sampling many responses of each prompt: prefill once, share the prompt's keys and values, decode together.

Works under tensor, sequence and pipeline parallelism: every rank of a model-parallel group calls `generate` with the
same arguments and gets the same tokens.

Shape legend: t prompt tokens in the packed stream, r responses, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.attention.cache import DecodeStep, PrefillStep, SharedPrefixCache
from megatron_ext.grouping import PackedTokens, StreamMedia
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.media import MediaPrompt, next_position, pack_prompts

__all__ = [
    "PromptStream", "SamplingParams", "UniformDraws", "choose_tokens", "generate", "next_token_probabilities",
    "prompt_streams", "text_logits",
]  # fmt: skip


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
                raise ValueError(message)


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
        ValueError: an empty prompt, or prompt plus response longer than the model's `encoder_seq_length`.
    """
    _check_lengths(model, prompts, params.max_new_tokens)
    device = next(model.parameters()).device
    multiple = stream_multiple(model.model_config)
    scheme = model.model_config.position_embedding.scheme
    batch = pack_prompts(prompts, [[] for _ in prompts], scheme, multiple, device)
    cache = SharedPrefixCache(batch.groups, samples_per_prompt, params.max_new_tokens)
    ends = torch.tensor([s.start + s.length - 1 for s in batch.groups.segments], device=device)
    first_position = torch.tensor([next_position(p, scheme) for p in prompts], device=device)
    first_position = first_position.repeat_interleave(samples_per_prompt)

    logits = _run_stage(model, batch.tokens, batch.position_ids, PrefillStep(cache), ends, batch.media)
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
        logits = _run_stage(model, step_tokens, step_positions, DecodeStep(cache, index), rows)
    responses = [_until_stop(r, params.stop_token_id) for r in torch.stack(columns, 1).tolist()]
    return [responses[i : i + samples_per_prompt] for i in range(0, len(responses), samples_per_prompt)]


@torch.no_grad()
def next_token_probabilities(
    model: PrefixGroupedGPT,
    prompts: Sequence[Sequence[int] | MediaPrompt],
    tokens: Sequence[int],
    stream_tokens: int = 8192,
) -> Tensor:
    """How likely each of some tokens is to continue each prompt.

    Args:
        model: this rank's pipeline stage, without a DDP wrapper.
        prompts: token ids, or prompts with media; none empty.
        tokens: ids, not repeated.
        stream_tokens: prompts are packed into streams of about this many tokens.

    Returns:
        fp32 [prompts, tokens], known on every rank of the model-parallel group.

    Raises:
        ValueError: an empty prompt, or one longer than the model's `encoder_seq_length`.
    """
    wanted = torch.tensor(tokens, device=next(model.parameters()).device)
    parts = []
    for stream in prompt_streams(model, prompts, stream_tokens):
        logits = stream.run(model)
        found = None if logits is None else logits.softmax(-1).index_select(1, wanted)
        parts.append(_from_last_stage(found, (len(stream.ends), len(tokens)), wanted.device))
    return torch.cat(parts) if parts else torch.empty(0, len(tokens), device=wanted.device)


@torch.no_grad()
def text_logits(model: PrefixGroupedGPT, text: Sequence[int] | MediaPrompt) -> Tensor:
    """Logits behind every token of one text, fp32 [tokens, v], known on every rank of the model-parallel group.

    Raises:
        ValueError: an empty text, or one longer than the model's `encoder_seq_length`.
    """
    (stream,) = prompt_streams(model, [text], stream_tokens=len(text))
    rows = torch.arange(len(text), device=stream.ends.device)
    shape = len(text), model.model_config.vocab_size
    return _from_last_stage(replace(stream, ends=rows).run(model), shape, rows.device)


def _from_last_stage(values: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """fp32 values that the last pipeline stage has, on every rank of the model-parallel group, whose last rank it holds."""
    group = parallel_state.get_model_parallel_group()
    values = torch.empty(shape, device=device) if values is None else values.contiguous()
    if group.size() > 1:
        dist.broadcast(values, src=dist.get_global_rank(group, group.size() - 1), group=group)
    return values


@dataclass(frozen=True)
class PromptStream:
    """Some prompts, packed, to run through the pipeline without gradient.

    Attributes:
        first: the number of its first prompt.
        batch: the stream.
        ends: int64 [prompts], the row of each prompt's last token.
    """

    first: int
    batch: PackedTokens
    ends: Tensor

    def run(self, model: PrefixGroupedGPT) -> Tensor | None:
        """Logits behind each prompt [prompts, v], on the last stage; None on the others. As in sampling, every
        context-parallel rank runs the whole stream."""
        step = PrefillStep(SharedPrefixCache(self.batch.groups, samples_per_prompt=1, max_new_tokens=1))
        return _run_stage(model, self.batch.tokens, self.batch.position_ids, step, self.ends, self.batch.media)


def prompt_streams(
    model: PrefixGroupedGPT, prompts: Sequence[Sequence[int] | MediaPrompt], stream_tokens: int, together: int = 1
) -> Iterator[PromptStream]:
    """Prompts in streams of about `stream_tokens` tokens, in order; `together` neighbours are never parted.

    Raises:
        ValueError: an empty prompt, or one longer than the model's `encoder_seq_length`.
    """
    _check_lengths(model, prompts, 0)
    device = next(model.parameters()).device
    scheme, multiple = model.model_config.position_embedding.scheme, stream_multiple(model.model_config)
    first = 0
    while first < len(prompts):
        last = first + together
        total = sum(len(p) for p in prompts[first:last])
        while (
            last < len(prompts)
            and total + (more := sum(len(p) for p in prompts[last : last + together])) <= stream_tokens
        ):
            total, last = total + more, last + together
        part = prompts[first:last]
        batch = pack_prompts(part, [[] for _ in part], scheme, multiple, device)
        ends = torch.tensor([s.start + s.length - 1 for s in batch.groups.segments], device=device)
        yield PromptStream(first, batch, ends)
        first = last


def _check_lengths(model: PrefixGroupedGPT, prompts: Sequence[Sequence[int] | MediaPrompt], new_tokens: int) -> None:
    limit = model.model_config.encoder_seq_length
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty: there is nothing to continue")
        if len(prompt) + new_tokens > limit:
            more = f" with max_new_tokens={new_tokens} that" if new_tokens else " that"
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens;{more} exceeds model.encoder_seq_length={limit}"
            )


def _until_stop(tokens: list[int], stop: int | None) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def _run_stage(
    model: PrefixGroupedGPT,
    tokens: Tensor,
    positions: Tensor,
    record: PackedSeqParams,
    rows: Tensor,
    media: StreamMedia | None = None,
) -> Tensor | None:
    """One forward pass through the pipeline: logits on the last stage, None on the others."""
    group = parallel_state.get_pipeline_model_parallel_group()
    stage, stages = group.rank(), group.size()
    if stage > 0:
        config = model.config
        length = len(tokens) // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        hidden = torch.empty(length, 1, config.hidden_size, dtype=config.pipeline_dtype, device=tokens.device)
        dist.recv(hidden, src=dist.get_global_rank(group, stage - 1), group=group)
        model.set_input_tensor(hidden)
    out = model(tokens, positions, record, rows=rows, media=media)
    if stage == stages - 1:
        return out
    dist.send(out.contiguous(), dst=dist.get_global_rank(group, stage + 1), group=group)
    return None


def _agree_on_tokens(
    logits: Tensor | None, params: SamplingParams, draws: UniformDraws, count: int, device: torch.device
) -> Tensor:
    """Sample on the last stage and tell the other ranks. Every rank draws, so that the generators stay in step.

    One rank decides for all, its tensor-parallel peers included: a cumulative sum on a GPU need not be the same twice,
    and ranks that disagree about one token would wait for each other for ever.
    """
    uniform = draws.next(count)
    if logits is None:
        tokens = torch.empty(count, dtype=torch.int64, device=device)
    else:
        tokens = choose_tokens(logits, params, uniform)
    group = parallel_state.get_model_parallel_group()  # the last of its ranks is on the last stage
    if group.size() > 1:
        dist.broadcast(tokens, src=dist.get_global_rank(group, group.size() - 1), group=group)
    return tokens
