"""FlexAttention over a prefix-grouped stream: a second way to the same numbers, and a place for score modifiers.

It shares nothing with the plan: a row sees a key when the key comes first and the row lies below the key's node. Compiled
on CUDA, where it has a backward; on the CPU PyTorch computes it without one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from megatron_ext.attention.kernels import Scoring
from megatron_ext.grouping import PrefixGroups

__all__ = ["flex_attention"]

ScoreModifier = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: PrefixGroups,
    scoring: Scoring,
    score_modifier: ScoreModifier | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [t, n, d], key and value [t, m, d] -> [t, n, d].

    Args:
        score_modifier: (score, batch, head, query row, key row) -> score, after the soft cap. Rows count the stream;
            `groups.position_ids` holds their positions.
        sinks: [n], as in `prefix_grouped_attention`.

    Raises:
        NotImplementedError: PyTorch's, for gradients on the CPU.
    """

    def modify(score, b, h, q_row, k_row):
        if scoring.softcap is not None:
            score = scoring.softcap * torch.tanh(score / scoring.softcap)
        return score if score_modifier is None else score_modifier(score, b, h, q_row, k_row)

    plain = scoring.softcap is None and score_modifier is None
    found = _flex(query.device.type)(
        *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)),  # [1, n or m, t, d]
        score_mod=None if plain else modify,
        block_mask=_block_mask(groups, scoring.window),
        scale=scoring.scale,
        enable_gqa=query.size(1) != key.size(1),
        return_lse=sinks is not None,
    )
    if sinks is None:
        return found.squeeze(0).transpose(0, 1)
    out, lse = found  # [1, n, t, d], [1, n, t], of which PyTorch knows the gradient
    share = (lse - sinks.view(1, -1, 1)).sigmoid().unsqueeze(-1)
    return (out * share).to(query.dtype).squeeze(0).transpose(0, 1)


def _block_mask(groups: PrefixGroups, window: int | None):
    """Kept with the record: it looks at all pairs of rows, on the CPU with a dozen bytes in memory for each."""
    from torch.nn.attention.flex_attention import create_block_mask

    if ("flex", window) not in groups.derived:
        device = groups.position_ids.device
        ends, row = [], 0  # of the rows below each node, the node included
        for tree in groups.trees:
            for length, end in zip(tree.lengths, tree.ends, strict=True):
                ends += [row + end] * length
            row += tree.num_tokens
        end = torch.tensor(ends + [groups.num_tokens] * groups.num_pad_tokens, device=device)
        position = groups.position_ids

        def visible(b, h, q_row, k_row):
            seen = (k_row <= q_row) & (q_row < end[k_row])
            return seen if window is None else seen & (position[q_row] - position[k_row] <= window)

        t = groups.num_tokens
        groups.derived["flex", window] = create_block_mask(
            visible, None, None, t, t, device=device, _compile=device.type == "cuda"
        )
    return groups.derived["flex", window]


@cache
def _flex(device_type: str):
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex, dynamic=True) if device_type == "cuda" else flex
