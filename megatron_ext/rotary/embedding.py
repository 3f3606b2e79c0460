"""Rotary embedding driven by position ids, with Megatron's `MultimodalRotaryEmbedding` call contract.

GPTModel ignores `position_ids` for plain 'rope' and restarts at every boundary of a packed stream. In 'mrope' mode it
hands the ids to the rotary module, which is the seam used here: suffixes of a prefix group really restart at P.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PositionIdRotaryEmbedding"]


class PositionIdRotaryEmbedding(torch.nn.Module):
    """Angles `position * base^(-2i/dim)` in fp32 (RoPE, arXiv 2104.09864), for any position ids.

    Args:
        kv_channels: head dimension.
        rotary_base: base of the frequencies.
        rotary_percent: share of the head dimension that is rotated.
        device: where the frequencies live.
    """

    def __init__(self, kv_channels: int, rotary_base: float, rotary_percent: float, device: torch.device | str):
        super().__init__()
        dim = int(kv_channels * rotary_percent)
        # A plain attribute: nothing rotary enters the state dict, and model.bfloat16() leaves it in fp32.
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        self.inv_freq = 1.0 / (rotary_base**exponent)

    def forward(self, position_ids: Tensor, mrope_section: list[int] | None = None, cp_group=None) -> Tensor:
        """position_ids int64 [1, b, s] -> embedding fp32 [s, b, 1, dim], both halves alike (not interleaved)."""
        angles = position_ids[0].t().unsqueeze(-1).float() * self.inv_freq  # [s, b, dim / 2]
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)  # [s, b, 1, dim]
