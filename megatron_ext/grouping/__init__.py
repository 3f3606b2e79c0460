"""Prefix groups: the lengths of one packed stream, and everything that follows from them.

A *group* is one prefix (a prompt) with its suffixes (the responses). A stream packs any number of groups

    [ P1 | S11 S12 .. S1g | P2 | S21 .. S2h | ... | pad ]          t tokens, batch dimension 1

so that each prompt is encoded once for all of its responses (Prefix Grouper, arXiv 2506.05433). Where responses share
more than the prompt a group is a tree (`megatron_ext.prefix_tree`), its nodes in depth-first order; a plain group is a
tree of depth 1. `PrefixGroups` is the stream's immutable record. It is built once per microbatch from Python ints and
handed to the model as `packed_seq_params`; no layer has to look at the data to know the layout, so nothing waits for
the device. `pack` makes a stream of token lists, `unpack` takes per-token values apart again.
"""

from megatron_ext.grouping.record import PrefixGroups
from megatron_ext.grouping.tables import Segment
from megatron_ext.grouping.tokens import PackedTokens, StreamEntry, StreamMedia, pack, unpack

__all__ = ["PackedTokens", "PrefixGroups", "Segment", "StreamEntry", "StreamMedia", "pack", "unpack"]
