"""Which form of plan to run: a call per level of the tree, or one call over copied keys."""

from __future__ import annotations

from megatron_ext.grouping import PrefixGroups

__all__ = ["one_call_pays"]


def one_call_pays(groups: PrefixGroups, num_heads: int, num_key_heads: int, device_type: str) -> bool:
    return False
