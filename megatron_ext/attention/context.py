"""Context parallelism: one stream over several ranks, keys and values of its cut documents gathered.

`ContextShard.of` says what this rank holds; `context_parallel_attention` runs it, in one of two forms (`cp_comm_type`,
Megatron's key):

    all_gather  every rank keeps its rows and gathers the keys and values of prefixes, and of responses that had to be
                cut; their gradients are summed in fp32 by a reduce-scatter. Any number of heads.
    a2a         (Ulysses, arXiv 2309.14509) an all-to-all gives every rank all rows of some heads, and another brings
                them back. Heads must divide by the ranks.

Shape legend: t_i rows of rank i with its pad, u predicted tokens of the stream, n query heads, m key/value heads,
d head dimension, c ranks.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.attention.function import (
    planned_attention,
    planned_attention_backward,
    prefix_grouped_attention,
    run_plan,
)
from megatron_ext.attention.kernels import Scoring, select_kernel
from megatron_ext.attention.plan import Plan
from megatron_ext.attention.sharding import shard_layout
from megatron_ext.attention.sinks import sinks_gradient
from megatron_ext.errors import UserError
from megatron_ext.grouping import PrefixGroups

__all__ = [
    "CP_COMM_TYPES", "ContextShard", "GatheredStream", "context_parallel_attention", "gather_predictions", "gather_rows",
    "gathered_attention",
]  # fmt: skip

CP_COMM_TYPES = ("all_gather", "a2a")


class ContextShard(PackedSeqParams):
    """This rank's part of a stream, handed to the model's layers as `packed_seq_params`. Build it with `of`.

    Attributes:
        groups: the whole stream's record.
        group: the context-parallel process group.
        layout: who holds what.
        num_tokens: t_i.
        rows: int64 [t_i], the stream's row behind each of mine; the pad repeats row 0, and nobody sees it.
        predict_rows, predict_index: int64, which of MY rows predict, on the host and on the device. One for each of
            my entries of the stream's `predict_index`.
        entries: int64, those entries.
        local_rows: int64 [t] on the host, the place of each of the stream's rows among mine, -1 for others'.
    """

    @classmethod
    def of(cls, groups: PrefixGroups, group: dist.ProcessGroup, multiple: int, pairs_per_token: float) -> ContextShard:
        """Work out this rank's part. Kept with the record, so that all passes over a microbatch share it.

        Args:
            multiple: t_i is a multiple of this.
            pairs_per_token: see `shard_layout`.
        """
        key = ("context", group.rank(), group.size(), multiple, pairs_per_token)
        if key not in groups.derived:
            groups.derived[key] = cls(groups, group, multiple, pairs_per_token)
        return groups.derived[key]

    def __init__(self, groups: PrefixGroups, group: dist.ProcessGroup, multiple: int, pairs_per_token: float):
        super().__init__(qkv_format="sbhd")
        rank, device = group.rank(), groups.position_ids.device
        layout = shard_layout(groups.trees, group.size(), pairs_per_token)
        self.groups, self.group, self.layout = groups, group, layout
        self.derived: dict = {}
        rows = torch.cat([torch.arange(s.start, s.start + s.length) for s in layout.spans[rank]] or [_empty()])
        # Never nothing: a rank without rows still takes part in every collective.
        num_pad = -len(rows) % multiple or (0 if len(rows) else multiple)
        self.num_tokens = len(rows) + num_pad
        self.rank, self.num_pad = rank, num_pad
        self._plans: dict[int | None, Plan] = {}
        place = torch.full((groups.num_tokens,), -1)
        place[rows] = torch.arange(len(rows))
        self.local_rows = place
        mine = place[groups.predict_rows]
        entries = (mine >= 0).nonzero().squeeze(1)
        self.predict_rows = mine[entries]
        self.predict_index, self.entries = self.predict_rows.to(device), entries.to(device)
        self.rows = torch.cat((rows, torch.zeros(num_pad, dtype=torch.int64))).to(device)
        self._index_gathered(rank, device)
        self._index_predictions(device)

    def _index_gathered(self, rank: int, device: torch.device) -> None:
        """My rows to send, padded to what the busiest rank sends, and the place of each gathered row."""
        layout, cut = self.layout, set(self.layout.cut)
        cut_spans = [[s for s in spans if s.document in cut] for spans in layout.spans]
        counts = [sum(s.length for s in spans) for spans in cut_spans]
        k = max(counts)
        local = [torch.arange(s.local_start, s.local_start + s.length) for s in cut_spans[rank]]
        self.num_sent = counts[rank]
        self.send = torch.cat([*local, torch.zeros(k - counts[rank], dtype=torch.int64)]).to(device)
        place = torch.empty(layout.num_gathered, dtype=torch.int64)
        for number, spans in enumerate(cut_spans):
            sent = number * k
            for s in spans:
                first = layout.gathered_start[s.document] + s.start - layout.documents[s.document].start
                place[first : first + s.length] = torch.arange(sent, sent + s.length)
                sent += s.length
        self.place = place.to(device)

    def _index_predictions(self, device: torch.device) -> None:
        """How many entries the busiest rank has, and the place of each entry of the stream among the gathered ones."""
        rows = torch.empty(self.groups.num_tokens, dtype=torch.int64)
        for number, spans in enumerate(self.layout.spans):
            for s in spans:
                rows[s.start : s.start + s.length] = number
        holder = rows[self.groups.predict_rows]  # [u]
        counts = torch.bincount(holder, minlength=self.group.size())
        self.most_entries = max(int(counts.max()), 1)
        place = torch.empty(len(holder), dtype=torch.int64)
        for number in range(self.group.size()):
            of_rank = (holder == number).nonzero().squeeze(1)
            place[of_rank] = number * self.most_entries + torch.arange(len(of_rank))
        self.entry_place = place.to(device)

    def plan(self, window: int | None = None) -> Plan:
        """Attention of my rows over [gathered rows | my rows]."""
        if window not in self._plans:
            self._plans[window] = self.layout.plan(self.rank, self.num_pad, window)
        return self._plans[window]

    @cached_property
    def concatenation(self) -> tuple[Tensor, Tensor]:
        """int64 each: the row of all ranks' concatenation (without pads) behind each stream row, and the other way."""
        rows = torch.cat([torch.arange(s.start, s.start + s.length) for spans in self.layout.spans for s in spans])
        return rows.argsort().to(self.rows.device), rows.to(self.rows.device)

    @cached_property
    def whole_stream(self) -> PrefixGroups:
        """The stream's record without its pad, which is not distributed."""
        return PrefixGroups.from_trees(self.groups.trees, device=self.rows.device)


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shard: ContextShard,
    scoring: Scoring,
    comm_type: str = "all_gather",
    attention_kernel: str = "auto",
    attention_plan: str = "auto",
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's rows over the whole stream; every rank of the group calls it.

    Args:
        query: [t_i, n, d], positions already applied.
        key, value: [t_i, m, d].
        comm_type: "all_gather" or "a2a".
        scoring, attention_kernel, attention_plan, sinks: as in `prefix_grouped_attention`; gradients of the sinks add up over
            ranks. "reference" and "flex", which know no plan, and "one_call" for a stream without windows run with a2a only.

    Returns:
        [t_i, n, d]. Rows of the pad hold values without meaning.
    """
    if comm_type == "a2a":
        return _all_to_all_attention(query, key, value, shard, scoring, attention_kernel, attention_plan, sinks)
    if attention_kernel in ("reference", "flex") or (attention_plan == "one_call" and scoring.window is None):
        asked = (
            f"attention_kernel={attention_kernel!r}" if attention_plan != "one_call" else "attention_plan='one_call'"
        )
        raise UserError(f"attention with {asked} runs with cp_comm_type=a2a only, got all_gather")
    kernel = select_kernel(attention_kernel, query.device, scoring)
    return _GatheredAttention.apply(query, key, value, sinks, shard, kernel, scoring)


class GatheredStream(PackedSeqParams):
    """A `ContextShard` whose keys have been gathered, as compressed rows, before they were made."""

    def __init__(self, shard: ContextShard):
        super().__init__(qkv_format="sbhd")
        self.shard = shard


def gathered_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    shard: ContextShard,
    scoring: Scoring,
    attention_kernel: str = "auto",
    sinks: Tensor | None = None,
) -> Tensor:
    """query [t_i, n, d] over keys [gathered rows + t_i, m, d] and values [gathered rows + t_i, m, e] -> [t_i, n, e]."""
    if attention_kernel in ("reference", "flex"):
        raise UserError(f"attention with attention_kernel={attention_kernel!r} cannot run over gathered keys; use auto")
    kernel = select_kernel(attention_kernel, query.device, scoring)
    return run_plan(query, keys, values, sinks, shard.plan(scoring.window), kernel, scoring)


def gather_rows(rows: Tensor, shard: ContextShard) -> Tensor:
    """[t_i, w] -> [gathered rows + t_i, w]: those of cut documents from all ranks, then this rank's own, by one collective. Their
    gradients are summed in fp32."""
    return _GatherRows.apply(rows, shard) if shard.layout.num_gathered else rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, shard):
        ctx.shard = shard
        return _gather(rows, shard)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _scatter(ctx.shard, grad).to(grad.dtype), None


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, shard, kernel, scoring):
        value = value.contiguous()
        keys, values = _gather_keys(key, value, shard)
        out, lse = planned_attention(query, keys, values, shard.plan(scoring.window), kernel, scoring, sinks)
        # Keys are gathered again in backward: kept, they would not be sharded.
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.shard, ctx.kernel, ctx.scoring = shard, kernel, scoring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, sinks, out, lse = ctx.saved_tensors
        shard = ctx.shard
        keys, values = _gather_keys(key, value, shard)
        dq, dk, dv = planned_attention_backward(
            grad, query, keys, values, out, lse, shard.plan(ctx.scoring.window), ctx.kernel, ctx.scoring
        )
        dk, dv = _scatter(shard, dk, dv).to(key.dtype).chunk(2, -1)  # [t_i, m, d] each
        return dq, dk.contiguous(), dv.contiguous(), sinks_gradient(grad, out, lse, sinks), None, None, None


def _gather_keys(key: Tensor, value: Tensor, shard: ContextShard) -> tuple[Tensor, Tensor]:
    """key, value [t_i, m, d] -> [gathered rows + t_i, m, d] each, by one collective."""
    if not shard.layout.num_gathered:
        return key, value
    keys, values = _gather(torch.cat((key, value), -1), shard).chunk(2, -1)
    return keys, values


def _gather(rows: Tensor, shard: ContextShard) -> Tensor:
    """[t_i, ...] -> [gathered rows + t_i, ...]."""
    mine = rows.index_select(0, shard.send)
    received = mine.new_empty(shard.group.size() * len(mine), *mine.shape[1:])
    dist.all_gather_into_tensor(received, mine, group=shard.group)
    return torch.cat((received.index_select(0, shard.place), rows))


def _scatter(shard: ContextShard, *grads: Tensor) -> Tensor:
    """The way back, summed over ranks in fp32 (or fp64): [gathered rows + t_i, ..., d] each -> [t_i, ..., sum of d]. They are cut
    before they are joined, and only what is sent is widened: nothing holds all that was gathered once more."""
    count = shard.layout.num_gathered
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    own = torch.cat([grad[count:] for grad in grads], -1).to(wide)
    if count:
        sent = grads[0].new_zeros(shard.group.size() * len(shard.send), *own.shape[1:])
        sent[shard.place] = torch.cat([grad[:count] for grad in grads], -1)
        mine = own.new_empty(len(shard.send), *own.shape[1:])
        dist.reduce_scatter_tensor(mine, sent.to(wide), group=shard.group)
        own.index_add_(0, shard.send[: shard.num_sent], mine[: shard.num_sent])
    return own


def _all_to_all_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shard: ContextShard,
    scoring: Scoring,
    attention_kernel: str,
    attention_plan: str,
    sinks: Tensor | None,
) -> Tensor:
    ranks, group = shard.group.size(), shard.group
    for name, x in (("query", query), ("key/value", key)):
        if x.size(1) % ranks:
            raise UserError(
                f"cp_comm_type=a2a: {x.size(1)} {name} heads of this tensor-parallel rank do not divide by "
                f"context_parallel_size={ranks}; use cp_comm_type=all_gather"
            )
    real = shard.layout.num_rows[group.rank()]
    of_stream, of_ranks = shard.concatenation
    heads = []
    for x in (query, key, value):
        # [t, n, d] -> [c t, n / c, d]: the part of every head group goes to its rank.
        parts = x[:real].unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1)
        rows = _AllToAll.apply(parts, [real] * ranks, list(shard.layout.num_rows), group)
        heads.append(rows.index_select(0, of_stream))  # all rows of the stream, in its order
    if sinks is not None:  # of the heads that are here now
        sinks = sinks.chunk(ranks)[group.rank()]
    out = prefix_grouped_attention(*heads, shard.whole_stream, scoring, attention_kernel, attention_plan, sinks)
    back = out.index_select(0, of_ranks)
    back = _AllToAll.apply(back, list(shard.layout.num_rows), [real] * ranks, group)
    back = back.unflatten(0, (ranks, real)).transpose(0, 1).flatten(1, 2)  # [real, n, d]
    return torch.nn.functional.pad(back, (0, 0, 0, 0, 0, shard.num_tokens - real))


class _AllToAll(torch.autograd.Function):
    """Rows to and from every rank; its backward is the way back."""

    @staticmethod
    def forward(ctx, x, sent, received, group):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class _GatherPredictions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, shard):
        ctx.shard = shard
        mine = values.new_zeros(shard.most_entries)
        mine[: len(values)] = values
        received = values.new_empty(shard.group.size() * shard.most_entries)
        dist.all_gather_into_tensor(received, mine, group=shard.group)
        return received.index_select(0, shard.entry_place)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.index_select(0, ctx.shard.entries), None


def gather_predictions(values: Tensor, shard: ContextShard) -> Tensor:
    """Values of my predicted tokens -> those of all, [u], on every rank.

    Every rank then computes the same loss; backward takes from its gradient what is this rank's own, so that gradients
    of ranks ADD up, as Megatron sums them over data- and context-parallel ranks.
    """
    return _GatherPredictions.apply(values, shard)
