"""Rotary position embeddings driven by position ids."""

from megatron_ext.rotary.embedding import PositionIdRotaryEmbedding

__all__ = ["PositionIdRotaryEmbedding"]
