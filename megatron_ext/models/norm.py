"""RMSNorm in plain torch that works with sequence parallelism, which Megatron's torch fallback refuses."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.errors import UserError

__all__ = ["RMSNorm"]


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32 for half-precision input (arXiv 1910.07467).

    The weight is marked `sequence_parallel` where the config says so: each rank then sees its own rows only, and
    Megatron sums the weight's gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise UserError(
                f"only plain RMSNorm is supported, got normalization={config.normalization!r}, "
                f"layernorm_zero_centered_gamma={config.layernorm_zero_centered_gamma}"
            )
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return torch.nn.functional.rms_norm(x, (x.size(-1),), self.weight, self.eps)
