"""Rotary embedding driven by position ids, with Megatron's `MultimodalRotaryEmbedding` call contract.

GPTModel ignores `position_ids` for plain 'rope' and restarts at every boundary of a packed stream. In 'mrope' mode it
hands the ids to the rotary module, which is the seam used here: suffixes of a prefix group really restart at P, and
tokens of a video stand where their scheme puts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.rotary.scaling import RopeScaling
from megatron_ext.rotary.schemes import find_scheme

__all__ = ["PositionIdRotaryEmbedding"]


class PositionIdRotaryEmbedding(torch.nn.Module):
    """Angles `position * base^(-2i/dim)` in fp32 (RoPE, arXiv 2104.09864), for any position ids.

    Args:
        kv_channels: head dimension.
        rotary_base: base of the frequencies.
        rotary_percent: share of the head dimension that is rotated.
        device: where the frequencies live.
        scheme: name of the position scheme, whose allocation says which axis of the ids turns which pair.
        interleaved: a pair is two neighbouring channels, not one from each half.
        scaling: frequencies of a model that was stretched to longer sequences.
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
            self.inv_freq = scaling.apply(self.inv_freq, rotary_base, dim)
        # Of cosines and sines, by whoever makes them of the angles.
        self.attention_scaling = 1.0 if scaling is None else scaling.attention_scaling
        self.scheme, self.interleaved = find_scheme(scheme), interleaved
        axes = self.scheme.axes_of_pairs(len(exponent), sections)
        still = torch.tensor([axis is None for axis in axes], device=device)
        self.inv_freq = self.inv_freq.masked_fill(still, 0)  # also in text
        self.axis = torch.tensor([axis or 0 for axis in axes], device=device)  # of each pair

    def forward(self, position_ids: Tensor, mrope_section: list[int] | None = None, cp_group=None) -> Tensor:
        """position_ids int64 or float64 [axes, b, s] -> embedding fp32 [s, b, 1, dim], as Megatron rotates with it.

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
