"""Rotary position embeddings driven by position ids, and the schemes that make the ids."""

from megatron_ext.rotary import published
from megatron_ext.rotary.embedding import PositionIdRotaryEmbedding
from megatron_ext.rotary.items import Image, Item, SharedText, Text, Video
from megatron_ext.rotary.scaling import ROPE_TYPES, RopeScaling
from megatron_ext.rotary.schemes import SCHEMES, PositionTable, Scheme, find_scheme, layout, register_scheme

__all__ = [
    "ROPE_TYPES", "SCHEMES", "Image", "Item", "PositionIdRotaryEmbedding", "PositionTable", "RopeScaling", "Scheme", "SharedText",
    "Text", "Video", "find_scheme", "layout", "published", "register_scheme",
]  # fmt: skip
