"""Prefix-grouped attention: plan, kernels, autograd function and the Megatron core-attention module."""

from megatron_ext.attention.core import PrefixGroupedCoreAttention
from megatron_ext.attention.function import prefix_grouped_attention

__all__ = ["PrefixGroupedCoreAttention", "prefix_grouped_attention"]
