"""Prefix-grouped attention: plan, kernels, autograd function and the Megatron core-attention module."""

from megatron_ext.attention.core import PrefixGroupedCoreAttention
from megatron_ext.attention.function import prefix_grouped_attention
from megatron_ext.attention.kernels import Scoring

__all__ = ["PrefixGroupedCoreAttention", "Scoring", "prefix_grouped_attention"]
