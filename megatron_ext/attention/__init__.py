"""Prefix-grouped attention: plan, kernels, autograd function and the Megatron core-attention module.

Words, from outside in:

    group      a prompt, the group's prefix, and its responses; a tree, where responses share more (`prefix_tree`)
    stream     the tokens of some groups, packed; one microbatch. `PrefixGroups` is its record
    segment    the rows of one node of a group's tree
    document   rows that are causal within themselves: a segment, or one and its only continuation
    span       consecutive rows of a document, all on one context-parallel rank
    plan       which query rows see which key rows, as calls: one per level of the trees ("levels"), or one over copied
               keys ("one_call"); `model.attention_plan`
    call       rectangles with disjoint query rows, all of them full or all of them causal
    rectangle  some query rows against some key rows. A run is a number of equal ones, evenly spaced
    piece      what one launch of a kernel computes: a run or a part of one (CPU), or a whole call (CUDA)
    page       so many tokens' keys and values, in sampling; a table lists the pages of a prompt or of a response
    kernel     gives a piece's output and its log-sum-exp, and their gradients; `model.attention_kernel`
"""

from megatron_ext.attention.core import PrefixGroupedCoreAttention
from megatron_ext.attention.function import prefix_grouped_attention
from megatron_ext.attention.kernels import Scoring

__all__ = ["PrefixGroupedCoreAttention", "Scoring", "prefix_grouped_attention"]
