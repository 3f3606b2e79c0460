"""What enters one block, kept by row: where only that block trains, nothing below it ever says anything else.

A row is one group of a stream, a prompt with its responses. Its hidden states are written down when a stream with it is run as a
whole, and a later stream of any rows enters the model at the block. In a stream of the same rows in the same order results are
bitwise those of the whole model; in another one sums are rounded in another order, and so are those of experts that a pad's rows
go to, which enter as zeros.

Shape legend: t rows of the stream, h hidden size, tp tensor-parallel size.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_ext.blocks.blocks import blocks_here
from megatron_ext.errors import UserError
from megatron_ext.grouping import PackedTokens, PrefixGroups, StreamEntry
from megatron_ext.models.gpt import PrefixGroupedGPT

__all__ = ["BlockInputs"]

SENT = 1 << 24  # numbers that data-parallel ranks add up at a time


class BlockInputs:
    """
    Args:
        model: this rank's pipeline stage, without a DDP wrapper.
        block: counted from 0 over all stages.
        limit: bytes that this rank may keep. Every tensor-parallel rank of the block's stage keeps whole rows.
        folder: on a local disk, for files that hold them and are gone with the process; None: the host's memory does.

    Attributes:
        kept: bytes so far.
    """

    def __init__(self, model: PrefixGroupedGPT, block: int, limit: int, folder: Path | None = None):
        self.model, self.block, self.limit, self.folder = model, block, limit, folder
        self.kept = 0
        self._layer = blocks_here(model).get(block)
        self._first: dict[str, list[int]] = {}  # of each row its first place, and the end
        self._hidden: dict[str, Tensor] = {}  # [tokens of all rows, h], on the host
        self._whole: set[str] = set()

    def reserve(self, kind: str, lengths: Sequence[int]) -> bool:
        """Make room for rows of so many tokens each. False where they would exceed the limit: they are not kept. All ranks
        answer alike.

        Raises:
            UserError: the folder cannot be written to, or its disk is full.
        """
        config = self.model.config
        first = [0]
        for length in lengths:
            first.append(first[-1] + length)
        size = first[-1] * config.hidden_size * config.params_dtype.itemsize
        if not first[-1] or self.kept + size > self.limit:
            return False
        self.kept += size
        self._first[kind] = first
        if self._layer is not None:
            self._hidden[kind] = self._room(kind, (first[-1], config.hidden_size))
        return True

    def _room(self, kind: str, shape: tuple[int, int]) -> Tensor:
        dtype = self.model.config.params_dtype
        if self.folder is None:
            return torch.zeros(shape, dtype=dtype)
        count = shape[0] * shape[1]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Of a name that no other process has, of this node or another. What is mapped stays until the process ends, however
            # that comes.
            with tempfile.NamedTemporaryFile(prefix=f"inputs-{kind}-", dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)  # zeros; a full disk says so now
                return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written to: {error.strerror}; choose another folder, or none"
            ) from error

    def has(self, kind: str) -> bool:
        """Whether all rows of a kind are known."""
        return kind in self._whole

    @contextlib.contextmanager
    def written_down(self, kind: str, numbers: Sequence[int], groups: PrefixGroups) -> Iterator[None]:
        """While a stream is run as a whole inside, keep what enters the block.

        Args:
            numbers: of the row that each group of the stream is.
        """
        if kind not in self._hidden:
            yield
            return

        def keep(layer, args, kwargs) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # [t (/ tp), 1, h]
            if self.model.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=self.model.pg_collection.tp)
            rows = hidden.detach().squeeze(1)[: _count(groups)]  # group by group, as segments lie
            self._hidden[kind][self._places(kind, numbers)] = rows.to("cpu")

        handle = self._layer.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def share(self, kind: str) -> None:
        """All rows have been written down, each by one data-parallel rank: let every one of them have all. All ranks call it."""
        if kind not in self._first:
            return
        group = parallel_state.get_data_parallel_group()
        if kind in self._hidden and group.size() > 1:
            device = next(self.model.parameters()).device
            for part in self._hidden[kind].view(-1).split(SENT):
                sent = part.to(device, copy=True)
                dist.all_reduce(sent, group=group)  # others have zeros there
                part.copy_(sent)
        self._whole.add(kind)

    def enter(self, kind: str, numbers: Sequence[int], batch: PackedTokens) -> PackedTokens:
        """The stream with its entry; as it is where its rows are not known. Its pad enters as zeros."""
        if not self.has(kind):
            return batch
        hidden = None
        if kind in self._hidden:
            device = batch.tokens.device
            kept = self._hidden[kind][self._places(kind, numbers)].to(device)
            assert len(kept) == _count(batch.groups), f"{len(kept)} rows of {kind} for {_count(batch.groups)}"
            pad = kept.new_zeros(batch.groups.num_pad_tokens, kept.size(1))
            hidden = torch.cat([kept, pad]).unsqueeze(1)  # [t, 1, h]
        return replace(batch, entry=StreamEntry(self.block, hidden))

    def _places(self, kind: str, numbers: Sequence[int]) -> Tensor:
        first = self._first[kind]
        return torch.cat([torch.arange(first[i], first[i + 1]) for i in numbers])


def _count(groups: PrefixGroups) -> int:
    return groups.num_tokens - groups.num_pad_tokens
