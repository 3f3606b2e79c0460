"""Shared-prefix GRPO, VRoPE and LFTF for Megatron-Core. Imports nothing itself."""

__version__ = "0.1.0"
