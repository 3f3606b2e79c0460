"""Rotary embedding driven by position ids, with Megatron's `MultimodalRotaryEmbedding` call contract.

GPTModel ignores `position_ids` for plain 'rope' and restarts at every boundary of a packed stream. In 'mrope' mode it
hands the ids to the rotary module, which is the seam used here: suffixes of a prefix group really restart at P, and
tokens of a video stand where their scheme puts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.rotary.schemes import find_scheme

__all__ = ["PositionIdRotaryEmbedding", "RopeScaling"]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of low frequencies (arXiv 2407.21783; the names are those of Hugging Face's config.json).

    Waves longer than original_max_position_embeddings / low_freq_factor turn `factor` times as slowly, those shorter
    than original_max_position_embeddings / high_freq_factor as before, those between in between.
    """

    # How many times as slowly the longest waves turn; at least 1. All four keys come with the weights.
    factor: float = 8.0
    # Waves of more tokens than original_max_position_embeddings / this turn `factor` times as slowly.
    low_freq_factor: float = 1.0
    # Waves of fewer tokens than original_max_position_embeddings / this stay as they are; those between in between.
    high_freq_factor: float = 4.0
    # Tokens of the sequences that the model was first trained on.
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.factor < 1 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(f"{self}: expected factor >= 1 and 0 < low_freq_factor < high_freq_factor")

    def apply(self, frequencies: Tensor) -> Tensor:
        """fp32 [pairs] -> fp32 [pairs]."""
        waves = self.original_max_position_embeddings * frequencies / (2 * math.pi)  # per original length
        kept = ((waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


class PositionIdRotaryEmbedding(torch.nn.Module):
    """Angles `position * base^(-2i/dim)` in fp32 (RoPE, arXiv 2104.09864), for any position ids.

    Args:
        kv_channels: head dimension.
        rotary_base: base of the frequencies.
        rotary_percent: share of the head dimension that is rotated.
        device: where the frequencies live.
        scheme: name of the position scheme, whose allocation says which axis of the ids turns which pair.
        interleaved: a pair is two neighbouring channels, not one from each half.
        scaling: stretching of low frequencies.
        sections: how many pairs each axis turns; None: the scheme's own division.

    Raises:
        UserError: no such scheme, or its allocation or the sections do not fit the pairs.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_base: float,
        rotary_percent: float,
        device: torch.device | str,
        scheme: str = "rope",
        interleaved: bool = False,
        scaling: RopeScaling | None = None,
        sections: Sequence[int] | None = None,
    ):
        super().__init__()
        dim = int(kv_channels * rotary_percent)
        # Plain attributes: nothing rotary enters the state dict, and model.bfloat16() leaves them in fp32.
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        self.inv_freq = 1.0 / (rotary_base**exponent)
        if scaling is not None:
            self.inv_freq = scaling.apply(self.inv_freq)
        self.scheme, self.interleaved = find_scheme(scheme), interleaved
        self.axis = torch.tensor(self.scheme.axes_of_pairs(len(exponent), sections), device=device)  # of each pair

    def forward(self, position_ids: Tensor, mrope_section: list[int] | None = None, cp_group=None) -> Tensor:
        """position_ids int64 [axes, b, s] -> embedding fp32 [s, b, 1, dim], as Megatron rotates with it.

        One axis stands for all: text.

        Raises:
            UserError: ids of another number of axes than the scheme has.
        """
        if position_ids.size(0) not in (1, self.scheme.axes):
            raise UserError(
                f"position scheme {self.scheme.name!r} has {self.scheme.axes} axes, got ids {tuple(position_ids.shape)}; "
                "make them with megatron_ext.rotary.layout"
            )
        if position_ids.size(0) == 1:
            angles = position_ids[0].t().unsqueeze(-1).float() * self.inv_freq  # [s, b, dim / 2]
        else:
            ids = position_ids.permute(2, 1, 0).float()  # [s, b, axes]
            angles = ids.index_select(-1, self.axis) * self.inv_freq
        if self.interleaved:
            return angles.repeat_interleave(2, dim=-1).unsqueeze(2)
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)  # [s, b, 1, dim]
