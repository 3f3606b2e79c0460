"""Megatron GPT models with prefix-grouped attention."""

from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT, build_gpt

__all__ = ["GPTModelConfig", "PrefixGroupedGPT", "build_gpt"]
