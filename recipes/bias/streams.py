"""The rows of LFTF as streams: pairs of words behind prompts, and texts, asked about or trained on.

Where one block trains, what enters it is kept (`megatron_ext.blocks.inputs`): the first time that rows of a kind are asked about
they are run as a whole, and from then on they enter the model at the block, in training and in validations alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.blocks.inputs import BlockInputs
from megatron_ext.blocks.pairs import pack_pairs
from megatron_ext.grouping import PackedTokens
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.media import pack_prompts
from megatron_ext.runtime.engine import Engine, Microbatch
from recipes.bias.scorers import STREAM_TOKENS, in_parts

__all__ = ["LFTFMicrobatch", "RowStreams"]


@dataclass(frozen=True, kw_only=True)
class LFTFMicrobatch(Microbatch):
    """
    Attributes:
        kind: of its rows.
        frozen: what the model said of them before training: of pairs probabilities [rows, 2], of texts log-probabilities [r].
        total: rows, or predicted tokens of texts, of the GLOBAL batch.
    """

    kind: str
    frozen: Tensor
    total: float


class RowStreams:
    """
    Args:
        model: this rank's pipeline stage, without a DDP wrapper.
        rows: by kind, token ids: prompts behind which the two words are asked about, or texts.
        texts: the kinds that are texts.
        pair: tokens of the two words.
    """

    def __init__(
        self, model: PrefixGroupedGPT, rows: dict[str, list[list[int]]], texts: Sequence[str], pair: tuple[int, int]
    ):
        self.model, self.rows, self.texts, self.pair = model, rows, set(texts), pair
        self.inputs: BlockInputs | None = None
        self._engine = Engine(model)  # asks
        self._device = next(model.parameters()).device

    def keep(self, inputs: BlockInputs) -> list[str]:
        """Keep what enters a block; returns the kinds that find no room."""
        self.inputs = inputs
        return [kind for kind in self.rows if not inputs.reserve(kind, self._lengths(kind, 2))]

    def _lengths(self, kind: str, words: int) -> list[int]:
        """Rows of a stream that each takes."""
        return [len(row) + (0 if kind in self.texts else words) for row in self.rows[kind]]

    def counts(self, kind: str) -> list[int]:
        """Numbers that are said of each row."""
        return [len(row) - 1 if kind in self.texts else 2 for row in self.rows[kind]]

    def batch(self, kind: str, numbers: Sequence[int]) -> PackedTokens:
        """Some rows as a stream, which enters the model where it may."""
        batch = self._whole(kind, numbers)
        return batch if self.inputs is None else self.inputs.enter(kind, numbers, batch)

    def _whole(self, kind: str, numbers: Sequence[int]) -> PackedTokens:
        config, rows = self.model.model_config, [self.rows[kind][i] for i in numbers]
        if kind not in self.texts:
            return pack_pairs(rows, self.pair, config, self._device)
        scheme, multiple = config.position_embedding.scheme, stream_multiple(config)
        return pack_prompts([() for _ in rows], [[row] for row in rows], scheme, multiple, self._device)

    def ask(self, kind: str) -> list[Tensor]:
        """What the model says, on the host and on every rank: of each prompt fp32 probabilities of the two words, of each text
        log-probabilities of all tokens but the first."""
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        found: list[Tensor] = [torch.zeros(count) for count in self.counts(kind)]
        lengths = self._lengths(kind, 2)
        keeps = self.inputs is not None and not self.inputs.has(kind)
        for part in in_parts(lengths[rank::ranks], STREAM_TOKENS):
            numbers = [rank + i * ranks for i in part]
            batch = self.batch(kind, numbers)
            if keeps:
                with self.inputs.written_down(kind, numbers, batch.groups):
                    (logprobs,) = self._engine.score([Microbatch(batch)])
            else:
                (logprobs,) = self._engine.score([Microbatch(batch)])
            answers = logprobs if kind in self.texts else logprobs.exp()
            said = answers.cpu().split([len(found[i]) for i in numbers])
            for number, values in zip(numbers, said, strict=True):
                found[number] = values
        if keeps:
            self.inputs.share(kind)
        every = torch.cat(found).to(self._device)
        dist.all_reduce(every, group=parallel_state.get_data_parallel_group())  # others have zeros
        return list(every.cpu().split([len(values) for values in found]))
