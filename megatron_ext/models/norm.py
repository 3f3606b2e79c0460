"""RMSNorm in plain torch that works with sequence parallelism, which Megatron's torch fallback refuses."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_ext.errors import UserError

__all__ = ["RMSNorm", "RMSNormAcrossHeads"]


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


class RMSNormAcrossHeads(torch.nn.Module):
    """The RMSNorm of all heads of a token together, of which a tensor-parallel rank has some: their mean square is everybody's.

    Args:
        hidden_size: of a head.
        heads: of all ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, heads: int = 1, **_):
        super().__init__()
        self.eps, self.width = eps, heads * hidden_size
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.weight = torch.nn.Parameter(torch.ones(self.width // self.group.size(), dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n, d], this rank's heads -> the same shape and dtype."""
        wide = x.flatten(-2).to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True)
        # A sum whose gradient is a sum as well: every rank's rows depend on every rank's heads.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normed = wide * torch.rsqrt(squares / self.width + self.eps) * self.weight
        return normed.to(x.dtype).view_as(x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None) -> ShardedStateDict:
        """Cut as the heads are."""
        state = {"weight": self.weight}
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0}, sharded_offsets,
            tp_group=self.group, dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )  # fmt: skip
