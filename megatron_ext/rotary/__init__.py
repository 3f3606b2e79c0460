"""Rotary position embeddings driven by position ids, and the schemes that make the ids."""

from megatron_ext.rotary.embedding import PositionIdRotaryEmbedding, RopeScaling
from megatron_ext.rotary.schemes import (
    SCHEMES,
    Image,
    Item,
    PositionTable,
    Scheme,
    SharedText,
    Text,
    Video,
    find_scheme,
    layout,
    register_scheme,
)

__all__ = [
    "SCHEMES", "Image", "Item", "PositionIdRotaryEmbedding", "PositionTable", "RopeScaling", "Scheme", "SharedText", "Text",
    "Video", "find_scheme", "layout", "register_scheme",
]  # fmt: skip
