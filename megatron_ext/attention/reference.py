"""The tests' oracle: explicit softmax over a dense mask in fp64, differentiated by autograd.

It shares no code with the plan or the kernels: the mask comes from the record's per-row tensors alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.attention.kernels import Scoring
from megatron_ext.grouping import PrefixGroups

__all__ = ["attention_mask", "reference_attention"]


def attention_mask(groups: PrefixGroups, window: int | None = None) -> Tensor:
    """bool [t, t], True where the row (query) may see the column (key): itself, and before it on its path.

    With a window, at most that many rows before it.
    """
    count = len(groups.segments) + (groups.num_pad_tokens > 0)
    on_path = torch.eye(count, dtype=torch.bool)  # [segment, its ancestors and itself]
    for number, segment in enumerate(groups.segments):
        if segment.parent is not None:
            on_path[number] |= on_path[segment.parent]
    row = torch.arange(groups.num_tokens, device=groups.segment_ids.device)
    visible = (row[:, None] >= row[None, :]) & on_path.to(row.device)[groups.segment_ids][:, groups.segment_ids]
    if window is None:
        return visible
    rank = visible.sum(1)  # a row's place on its path, counted from 1
    return visible & (rank[:, None] - rank[None, :] <= window)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, groups: PrefixGroups, scoring: Scoring, sinks: Tensor | None = None
) -> Tensor:
    """query [t, n, d], key and value [t, m, d], sinks [n] -> [t, n, d] in query's dtype, computed in fp64."""
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))  # [n or m, t, d]
    repeat = q.size(0) // k.size(0)
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)  # [n, t, d]
    scores = (q @ k.transpose(1, 2)) * scoring.scale  # [n, t, t]
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~attention_mask(groups, scoring.window), float("-inf"))
    if sinks is not None:  # one more key, without a value
        scores = torch.cat((scores, sinks.double().view(-1, 1, 1).expand(-1, len(query), 1)), -1)
    return (scores.softmax(-1)[..., : len(query)] @ v).transpose(0, 1).to(query.dtype)
