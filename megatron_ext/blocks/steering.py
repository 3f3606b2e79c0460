"""Activation steering at generation: what passes a block loses the direction in which a hint of gender moves it.

The direction is the difference of means of two sets of prompts that differ in their hint alone, as contrastive activation
addition has it (arXiv 2312.06681). To add it would make every profession more of one word's; it is projected out, as directional
ablation does (arXiv 2406.11717, equation 4), about the middle of both means: what both have in common stays. No weight changes.

Shape legend: t rows of the stream, b = 1, h hidden size, tp tensor-parallel size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.blocks.blocks import check_block, tapped
from megatron_ext.blocks.exchange import all_rows
from megatron_ext.blocks.importance import BiasProbe
from megatron_ext.errors import UserError
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.prompt_streams import prompt_streams

__all__ = ["Steering", "find_steering", "steered"]


@dataclass(frozen=True)
class Steering:
    """
    Attributes:
        block: behind which hidden states are changed.
        direction: fp64 [h], of length 1.
        middle: fp64 [], where along it both sets' means meet.
    """

    block: int
    direction: Tensor
    middle: Tensor

    def steer(self, hidden: Tensor, strength: float = 1.0) -> Tensor:
        """x - strength (x^T r - m) r for every row of [..., h], in its type."""
        r = self.direction.to(hidden.dtype)
        along = (hidden @ r).unsqueeze(-1) - self.middle.to(hidden.dtype)
        return hidden - strength * along * r


@torch.no_grad()
def find_steering(model: PrefixGroupedGPT, block: int, probe: BiasProbe) -> Steering:
    """Of the last tokens of the probe's pairs of prompts, behind a block; every rank calls it and gets the same.

    Raises:
        UserError: no such block, or no pair.
    """
    check_block(block, model.model_config.num_layers)
    if not probe.swapped:
        raise UserError("steering needs pairs of prompts that differ in their hint; there is none")
    device, size = next(model.parameters()).device, model.model_config.hidden_size
    sums = torch.zeros(2, size, dtype=torch.float64, device=device)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    prompts = [prompt for pair in probe.swapped[rank::ranks] for prompt in pair]
    for stream in prompt_streams(model, prompts, probe.stream_tokens, together=2):

        def add(number: int, before: Tensor, after: Tensor, ends: Tensor = stream.ends) -> None:
            if number == block:
                sums.add_(all_rows(model, after)[ends].double().view(-1, 2, size).sum(0))

        with tapped(model, add):
            stream.run(model)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())  # other stages have zeros
    first, second = sums / len(probe.swapped)
    direction = first - second
    if not direction.any():
        raise UserError(f"behind block {block} both hints leave the same: there is no direction to steer along")
    direction = direction / direction.norm()
    return Steering(block, direction, (first + second) @ direction / 2)


@contextlib.contextmanager
def steered(model: PrefixGroupedGPT, steering: Steering, strength: float = 1.0) -> Iterator[None]:
    """While inside, every row that leaves the block is steered, whatever runs the model: scoring or sampling."""

    def change(number: int, before: Tensor, after: Tensor) -> Tensor | None:
        return steering.steer(after, strength) if number == steering.block else None

    with tapped(model, change):
        yield
