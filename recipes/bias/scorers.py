"""Who answers an evaluation's questions: a Megatron model under any layout of ranks, or a Hugging Face folder.

Both give the probabilities of a pair of words behind prompts, and the log-probabilities of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.media import pack_prompts
from megatron_ext.models.prompt_streams import next_token_probabilities
from megatron_ext.runtime.collectives import gather_objects
from megatron_ext.runtime.engine import Engine, Microbatch

__all__ = ["STREAM_TOKENS", "HuggingFaceScorer", "MegatronScorer", "Scorer", "answer_probabilities", "in_parts"]

STREAM_TOKENS = 8192
BATCH_TOKENS = 4096  # of a Hugging Face batch, padding counted

# Called with the number of rows that have been answered since the last call.
Progress = Callable[[int], object]


class Scorer(Protocol):
    """Answers come on the host and are the same on every rank."""

    def pair_probabilities(
        self, prompts: Sequence[Sequence[int]], pair: Sequence[int], progress: Progress = ...
    ) -> Tensor:
        """fp32 [n, tokens]: P(next token) of each of these tokens, two or more."""

    def token_logprobs(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Progress = ...
    ) -> list[Tensor]:
        """Of each row (prompt, text) the log-probabilities fp32 of the text's tokens; without a prompt all but the first. A row's
        last token is not read, so that it may have one more than the model reads."""


def answer_probabilities(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    progress: Progress = lambda rows: None,
) -> Tensor:
    """fp32 [n, answers]: how likely each answer, of one token or several, is behind each prompt: the product of its tokens'
    probabilities. `progress` counts prompts."""
    if all(len(answer) == 1 for answer in answers):
        return scorer.pair_probabilities(prompts, [answer[0] for answer in answers], progress)
    done = [0]

    def rows(more: int) -> None:
        before, done[0] = done[0] // len(answers), done[0] + more
        progress(done[0] // len(answers) - before)

    logprobs = scorer.token_logprobs([(prompt, answer) for prompt in prompts for answer in answers], rows)
    return torch.stack([values.double().sum() for values in logprobs]).view(-1, len(answers)).exp().float()


class MegatronScorer:
    """
    Args:
        model: this rank's pipeline stage, without a DDP wrapper.
    """

    def __init__(self, model: PrefixGroupedGPT):
        self.model, self.engine = model, Engine(model)
        self.rank, self.ranks = (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )

    def pair_probabilities(self, prompts, pair, progress=lambda rows: None) -> Tensor:
        found = torch.zeros(len(prompts), len(pair))
        for part in in_parts([len(p) for p in prompts[self.rank :: self.ranks]], STREAM_TOKENS):
            mine = [self.rank + i * self.ranks for i in part]
            found[mine] = next_token_probabilities(self.model, [prompts[i] for i in mine], pair).cpu()
            progress(len(mine) * self.ranks)
        return self._over_data(found)

    def _over_data(self, values: Tensor) -> Tensor:
        """Sum over data-parallel ranks, each of which has filled its own rows."""
        values = values.to(next(self.model.parameters()).device)
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
        return values.cpu()

    def token_logprobs(self, rows, progress=lambda rows: None) -> list[Tensor]:
        config, device = self.model.model_config, next(self.model.parameters()).device
        for number, (prompt, text) in enumerate(rows):
            if len(prompt) + len(text) - 1 > config.encoder_seq_length:
                raise UserError(
                    f"row {number} has {len(prompt) + len(text)} tokens, of which all but the last are read; that exceeds "
                    f"model.encoder_seq_length={config.encoder_seq_length}"
                )
        mine: dict[int, Tensor] = {}
        own = _shared_prompts(rows)[self.rank :: self.ranks]
        lengths = [len(rows[group[0]][0]) + sum(len(rows[i][1]) for i in group) for group in own]
        for part in in_parts(lengths, STREAM_TOKENS):
            numbers = [i for place in part for i in own[place]]
            prompts = [rows[own[place][0]][0] for place in part]
            texts = [[rows[i][1] for i in own[place]] for place in part]
            scheme = config.position_embedding.scheme
            batch = pack_prompts(prompts, texts, scheme, stream_multiple(config), device)
            (logprobs,) = self.engine.score([Microbatch(batch)])
            counts = [len(rows[i][1]) - (not len(rows[i][0])) for i in numbers]
            mine |= zip(numbers, logprobs.detach().cpu().split(counts), strict=True)
            progress(len(numbers) * self.ranks)
        shares = gather_objects(mine, parallel_state.get_data_parallel_group())
        found = {number: values for share in shares for number, values in share.items()}
        return [found[number] for number in range(len(rows))]


class HuggingFaceScorer:
    """A causal language model that transformers loads from a local folder; one process.

    Raises:
        UserError: transformers cannot load it, or would fill weights that the folder lacks with random numbers.
    """

    def __init__(self, folder: str | Path, device: torch.device, dtype: torch.dtype):
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        try:
            self.model, report = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
        _check_loaded(folder, report)
        self.model.eval().to(device)
        self.device = device

    @torch.no_grad()
    def pair_probabilities(self, prompts, pair, progress=lambda rows: None) -> Tensor:
        found = torch.zeros(len(prompts), len(pair))
        for numbers, logits in self._logits(prompts):
            ends = torch.tensor([len(prompts[i]) - 1 for i in numbers], device=self.device)
            last = logits[torch.arange(len(numbers), device=self.device), ends]  # [n, v]
            found[numbers] = last.float().softmax(-1)[:, list(pair)].cpu()
            progress(len(numbers))
        return found

    @torch.no_grad()
    def token_logprobs(self, rows, progress=lambda rows: None) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        texts = [[*prompt, *text] for prompt, text in rows]
        for numbers, logits in self._logits([text[:-1] or text for text in texts]):
            for row, number in zip(logits, numbers, strict=True):
                prompt, _ = rows[number]
                targets = torch.tensor(texts[number][1:], device=self.device)
                logprobs = row[: len(targets)].float().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
                found[number] = logprobs[max(len(prompt) - 1, 0) :].cpu()
            progress(len(numbers))
        return [found[number] for number in range(len(rows))]

    @torch.no_grad()
    def logits(self, text: Sequence[int]) -> Tensor:
        """fp32 [tokens, v] behind every token of one text, on the host."""
        ((_, logits),) = self._logits([text])
        return logits[0].float().cpu()

    def _logits(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """(row numbers, logits [rows, tokens, v]) of batches that are padded behind."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for number, text in enumerate(texts):
            if not text or (limit is not None and len(text) > limit):
                raise UserError(f"row {number} has {len(text)} tokens to read; the model reads 1 to {limit}")
        for numbers in in_parts([len(t) for t in texts], BATCH_TOKENS, padded=True):
            longest = max(len(texts[i]) for i in numbers)
            ids = torch.zeros(len(numbers), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(numbers):
                ids[row, : len(texts[number])] = torch.tensor(texts[number])
                mask[row, : len(texts[number])] = 1
            yield numbers, self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits


def _shared_prompts(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[int]]:
    """Numbers of neighbouring rows with the same prompt, which is run once for them, of at most `STREAM_TOKENS` tokens. A prompt
    of a single token, such as the begin token, is not worth it."""
    groups: list[list[int]] = []
    total = 0
    for number, (prompt, text) in enumerate(rows):
        total += len(text)
        if not groups or len(prompt) < 2 or prompt != rows[number - 1][0] or total > STREAM_TOKENS:
            groups.append([])
            total = len(prompt) + len(text)
        groups[-1].append(number)
    return groups


def _check_loaded(folder: str | Path, report: Mapping[str, Collection]) -> None:
    """transformers only prints which weights it has made up. A tied weight that stands once is not among them."""
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{folder} lacks {len(missing)} weights that its config.json asks for, first {missing[0]}: scores of random "
            "numbers would mean nothing; complete the folder"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise UserError(
            f"{folder}: {name} has shape {list(found)}, and its config.json asks for {list(expected)} "
            f"({len(mismatched)} such); config.json and weights must belong together"
        )


def in_parts(lengths: Sequence[int], tokens: int, padded: bool = False) -> Iterator[list[int]]:
    """Neighbouring rows of together at most `tokens` tokens, at least one. Padded ones are all as long as the longest."""
    part: list[int] = []
    total = longest = 0
    for number, length in enumerate(lengths):
        size = (len(part) + 1) * max(longest, length) if padded else total + length
        if part and size > tokens:
            yield part
            part, total, longest = [], 0, 0
        part.append(number)
        total, longest = total + length, max(longest, length)
    if part:
        yield part
