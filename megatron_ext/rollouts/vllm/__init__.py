"""Rollouts from vLLM servers over HTTP; no package of vLLM's is imported."""

from megatron_ext.rollouts.vllm.protocol import VllmError
from megatron_ext.rollouts.vllm.source import Begun, Home, VllmSource

__all__ = ["Begun", "Home", "VllmError", "VllmSource"]
