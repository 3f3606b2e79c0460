"""Prompts through the pipeline without gradient: what the model says next, or behind every token.

Works under tensor, sequence and pipeline parallelism: every rank of a model-parallel group calls with the same arguments.

Shape legend: t prompt tokens in the packed stream, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.attention.cache import PrefillStep
from megatron_ext.errors import UserError
from megatron_ext.grouping import PackedTokens, StreamMedia
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.media import MediaPrompt, pack_prompts
from megatron_ext.runtime.collectives import from_last
from megatron_ext.runtime.expert_load import most_of_experts
from megatron_ext.runtime.pieces import ModelPieces, pieces_of
from megatron_ext.runtime.progress import PROGRESS

__all__ = [
    "PromptStream", "StageRun", "check_lengths", "from_last_stage", "idle_run", "next_token_probabilities", "prompt_streams",
    "text_logits",
]  # fmt: skip


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
        step = PrefillStep(self.batch.groups)
        return StageRun(model, self.batch.tokens, self.batch.position_ids, step, self.ends, self.batch.media).whole()


def prompt_streams(
    model: PrefixGroupedGPT, prompts: Sequence[Sequence[int] | MediaPrompt], stream_tokens: int, together: int = 1
) -> Iterator[PromptStream]:
    """Prompts in streams of about `stream_tokens` tokens, in order; `together` neighbours are never parted.

    Raises:
        UserError: an empty prompt, or one longer than the model's `encoder_seq_length`.
    """
    check_lengths(model, [(prompt, 0) for prompt in prompts])
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
        UserError: an empty prompt, or one longer than the model's `encoder_seq_length`.
    """
    wanted = torch.tensor(tokens, device=next(model.parameters()).device)
    parts = []
    for stream in prompt_streams(model, prompts, stream_tokens):
        logits = stream.run(model)
        PROGRESS.made()
        found = None if logits is None else logits.softmax(-1).index_select(1, wanted)
        parts.append(from_last_stage(found, (len(stream.ends), len(tokens)), wanted.device))
    for _ in range(most_of_experts(model.config, len(parts)) - len(parts)):
        idle_run(model).whole()
    return torch.cat(parts) if parts else torch.empty(0, len(tokens), device=wanted.device)


@torch.no_grad()
def text_logits(model: PrefixGroupedGPT, text: Sequence[int] | MediaPrompt) -> Tensor:
    """Logits behind every token of one text, fp32 [tokens, v], known on every rank of the model-parallel group.

    Raises:
        UserError: an empty text, or one longer than the model's `encoder_seq_length`.
    """
    (stream,) = prompt_streams(model, [text], stream_tokens=len(text))
    rows = torch.arange(len(text), device=stream.ends.device)
    shape = len(text), model.model_config.vocab_size
    return from_last_stage(replace(stream, ends=rows).run(model), shape, rows.device)


def idle_run(model: PrefixGroupedGPT | ModelPieces) -> StageRun:
    """Of a stream that nobody asked for, where a rank has nothing to run and others that share experts with it have."""
    config, device = model.model_config, next(model.parameters()).device
    batch = pack_prompts([[0]], [[]], config.position_embedding.scheme, stream_multiple(config), device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    return StageRun(model, batch.tokens, batch.position_ids, PrefillStep(batch.groups), rows)


def check_lengths(model: PrefixGroupedGPT, prompts: Iterable[tuple[Sequence[int] | MediaPrompt, int]]) -> None:
    """
    Args:
        prompts: with the tokens that may follow each.

    Raises:
        UserError: an empty prompt, or one that with what follows is longer than the model's `encoder_seq_length`.
    """
    limit = model.model_config.encoder_seq_length
    for number, (prompt, new_tokens) in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty: there is nothing to continue")
        if len(prompt) + new_tokens > limit:
            more = f" with max_new_tokens={new_tokens} that" if new_tokens else " that"
            raise UserError(f"prompt {number} has {len(prompt)} tokens;{more} exceeds model.encoder_seq_length={limit}")


class StageRun:
    """One forward pass of a stream through the pipeline, this rank's part of it, piece by piece.

    In pieces the stream goes round the stages once for each. Streams that are on their way at once must be run in one order on
    all stages.

    Args:
        rows: whose logits are wanted.
    """

    def __init__(
        self,
        model: PrefixGroupedGPT | ModelPieces,
        tokens: Tensor,
        positions: Tensor,
        record: PackedSeqParams,
        rows: Tensor,
        media: StreamMedia | None = None,
    ):
        self._pieces, self._config = pieces_of(model), model.config
        self._given = tokens, positions, record, rows, media
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def whole(self) -> Tensor | None:
        """Logits on the last stage, None on the others."""
        for number in range(len(self._pieces)):
            out = self.piece(number)
        self.wait()
        return out

    def piece(self, number: int) -> Tensor | None:
        """Logits behind the last piece of the last stage, else None."""
        group, config = parallel_state.get_pipeline_model_parallel_group(), self._config
        stage, stages = group.rank(), group.size()
        before, behind = (dist.get_global_rank(group, (stage + step) % stages) for step in (-1, 1))
        tokens, positions, record, rows, media = self._given
        piece = self._pieces[number]
        if stage > 0 or number > 0:
            length = len(tokens) // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
            hidden = torch.empty(length, 1, config.hidden_size, dtype=config.pipeline_dtype, device=tokens.device)
            dist.recv(hidden, src=before, group=_sender(group, stage - 1))
            piece.set_input_tensor(hidden)
        out = piece(tokens, positions, record, rows=rows, media=media)
        if stage == stages - 1 and piece is self._pieces[-1]:
            return out
        out = out.contiguous()
        self._sent.append((dist.isend(out, dst=behind, group=_sender(group, stage)), out))
        return None

    def wait(self) -> None:
        """Until the next stage has taken what was sent to it."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


def _sender(group: dist.ProcessGroup, stage: int) -> dist.ProcessGroup:
    """Through which group a stage sends. Two stages that send to each other need one each: within one a send would wait behind a
    receive, which waits for the other's send. Megatron's own pipeline takes the world for the second, too."""
    return dist.group.WORLD if group.size() == 2 and stage % 2 else group


def from_last_stage(
    values: Tensor | None, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values that the last pipeline stage has, on every rank of the model-parallel group, whose last rank it holds."""
    return from_last(values, shape, device, parallel_state.get_model_parallel_group(), dtype)
