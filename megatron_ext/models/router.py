"""Which experts a token takes, and with which weights.

A router of ours stands where Megatron's own would (by spec), for three reasons. It counts a prompt's token as often as it has
responses, in whatever looks at more than one token: the auxiliary loss, the experts' biases, the load. It follows routes that
another pass took. And it computes in fp32, or in the model's own precision where that is finer.

Shape legend: t rows on this rank, h hidden size, e experts, k experts of a token, g groups of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.attention.context import ContextShard
from megatron_ext.grouping import PrefixGroups
from megatron_ext.grouping.routes import UNKNOWN, Routes
from megatron_ext.models.expert_config import ExpertConfig
from megatron_ext.runtime.expert_load import ExpertLoad

__all__ = ["ExpertLayer", "ExpertRouter", "choose_experts"]

LEAST = 1e-20  # added to the sum of a token's scores, as transformers' DeepSeek has it


def choose_experts(
    logits: Tensor, rules: ExpertConfig, bias: Tensor | None, routes: Tensor | None = None, partly: bool = False
) -> tuple[Tensor, ...]:
    """Score every expert, and choose.

    Args:
        logits: [t, e].
        bias: [e], added where experts are chosen alone.
        routes: int64 [t, k], experts that are taken whatever the scores say.
        partly: some of them are UNKNOWN: rows that are free.

    Returns:
        scores [t, e], experts int64 [t, k], their weights [t, k].
    """
    scores = logits.softmax(-1) if rules.moe_router_score_function == "softmax" else logits.sigmoid()
    if routes is None or partly:
        wanted = scores.detach() if bias is None else scores.detach() + bias
        if rules.moe_router_num_groups is not None:
            wanted = _best_groups(wanted, rules)
        own = wanted.topk(rules.moe_router_topk, dim=-1).indices
        routes = own if routes is None else torch.where(routes == UNKNOWN, own, routes)
    weights = scores.gather(1, routes)
    if rules.moe_router_norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST)
    return scores, routes, weights * (rules.moe_router_topk_scaling_factor or 1.0)


def _best_groups(wanted: Tensor, rules: ExpertConfig) -> Tensor:
    """Scores [t, e] with those outside of a token's best groups at minus infinity."""
    groups, chosen = rules.moe_router_num_groups, rules.moe_router_group_topk
    best = rules.moe_router_group_best or rules.moe_router_topk // chosen
    by_group = wanted.unflatten(1, (groups, -1))  # [t, g, e / g]
    value = by_group.topk(best, dim=-1).values.sum(-1)  # [t, g]
    out = torch.ones_like(value, dtype=torch.bool).scatter_(1, value.topk(chosen, dim=-1).indices, False)
    return by_group.masked_fill(out.unsqueeze(-1), float("-inf")).flatten(1)


class ExpertRouter(ExpertLoad):
    """Megatron's `RouterInterface`.

    Args:
        rules: keys of the configuration.
    """

    def __init__(self, config: TransformerConfig, rules: ExpertConfig, pg_collection=None, **_):
        super().__init__(
            config, rules.moe_router_enable_expert_bias, rules.moe_router_bias_update_rate, rules.moe_aux_loss_coeff > 0
        )
        self.rules = rules
        self.tp_group, self.sharing = pg_collection.tp, pg_collection.tp_cp  # `sharing` ranks have rows of one stream
        self.layer_number = 0
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.empty(config.num_moe_experts, config.hidden_size, dtype=torch.float32, device=device)
        if config.perform_initialization:
            config.init_method(weight)
        self.weight = torch.nn.Parameter(weight.to(config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias = None
        if rules.add_bias_linear:
            self.bias = torch.nn.Parameter(torch.zeros(len(weight), dtype=config.params_dtype, device=device))
            self.bias.sequence_parallel = config.sequence_parallel
        self._record: PackedSeqParams | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Counted from 1."""
        self.layer_number = layer_number

    @contextmanager
    def reading(self, record: PackedSeqParams | None) -> Iterator[None]:
        """While a layer runs: of which stream its rows are."""
        before, self._record = self._record, record
        try:
            yield
        finally:
            self._record = before

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """hidden [s, b, h] -> the weights [t, e] of a token's experts, 0 for others, and which those are, bool [t, e]."""
        rows = hidden.reshape(-1, hidden.size(-1))
        logits = _Logits.apply(rows, self.weight)
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        told = self._told(len(rows))
        partly = told is not None and Routes.of(self._stream(self._record)).table is not None
        scores, routes, weights = choose_experts(logits, self.rules, self.expert_bias, told, partly)
        if told is None:
            self._write(routes)
        taken = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, routes, True)
        weights = torch.zeros_like(logits).scatter(1, routes, weights)
        if self.training and torch.is_grad_enabled():
            weights = self._observe(weights, scores, taken)
        return weights, taken

    def _told(self, rows: int) -> Tensor | None:
        """int64 [t, k], what this layer's rows have to take; None: they are free."""
        routes = self._routes()
        if routes is None or not routes.follows:
            return None
        record = self._record
        mine = slice(self.tp_group.rank() * rows, None) if self.config.sequence_parallel else slice(None)
        told = routes.read(self.layer_number - 1, record.rows if isinstance(record, ContextShard) else None, mine)[
            :rows
        ]
        routes.followed += rows
        return told

    def _write(self, taken: Tensor) -> None:
        if (routes := self._routes()) is not None:
            routes.write(self.layer_number - 1, taken)

    def _routes(self) -> Routes | None:
        record = self._record
        return Routes.of(self._stream(record)) if isinstance(record, (PrefixGroups, ContextShard)) else None

    def _observe(self, weights: Tensor, scores: Tensor, taken: Tensor) -> Tensor:
        """Count the experts' tokens; the weights again, whose gradient then has the auxiliary loss's."""
        counts = self._counts(self._record, len(taken))
        if counts is None:
            return weights
        tokens = counts.to(torch.float64) @ taken.to(torch.float64)  # [e]
        if not self.balanced:
            self.count(tokens)
            return weights
        loss = self._balance(scores, counts.to(scores.dtype), tokens)
        self.count(tokens, loss.detach())
        return _LossBeside.apply(weights, loss)

    def _balance(self, scores: Tensor, counts: Tensor, tokens: Tensor) -> Tensor:
        """This rank's part of the stream's share of the step's auxiliary loss (arXiv 2101.03961, equation 4, with k experts).

        coeff x e / (k n) x sum over experts of (tokens of the expert) x (its mean score), n logical tokens; times n of all the
        step's.
        """
        everywhere = tokens.clone()
        torch.distributed.all_reduce(everywhere, group=self.sharing)
        total = self._stream(self._record).num_repeated_tokens
        if self.rules.moe_router_score_function == "sigmoid":
            scores = scores / (scores.sum(-1, keepdim=True) + LEAST)
        means = counts @ scores / total  # [e], of this rank's rows
        rules, experts = self.rules, len(tokens)
        factor = rules.moe_aux_loss_coeff * experts / (rules.moe_router_topk * total) * total
        return factor / (self.step_tokens or total) * (everywhere.to(means.dtype) * means).sum()

    @staticmethod
    def _stream(record: PackedSeqParams) -> PrefixGroups:
        return record.groups if isinstance(record, ContextShard) else record

    def _counts(self, record: PackedSeqParams | None, rows: int) -> Tensor | None:
        """int64 [t]: in how many responses each of this rank's rows stands. None: it is no stream of responses."""
        if not isinstance(record, (PrefixGroups, ContextShard)):
            return None
        key = ("experts", rows)
        if key not in record.derived:
            counts = self._stream(record).response_counts
            if isinstance(record, ContextShard):
                counts = counts[record.rows]
                counts[record.num_tokens - record.num_pad :] = 0
            if self.config.sequence_parallel:
                counts = counts[self.tp_group.rank() * rows :][:rows]
            record.derived[key] = counts
        return record.derived[key]


class _LossBeside(torch.autograd.Function):
    """Hands on a tensor, in whose backward pass a loss [] has its own, with weight 1: ours are normalised already."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)


class _Logits(torch.autograd.Function):
    """rows [t, h] x weight [e, h] in fp32 or finer; kept for backward as they are."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return rows.to(dtype) @ weight.to(dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        to_rows = gradient @ weight.to(gradient.dtype)
        to_weight = gradient.t() @ rows.to(gradient.dtype)
        return to_rows.to(rows.dtype), to_weight.to(weight.dtype)


class ExpertLayer(TransformerLayer):
    """Megatron's layer, which tells its router whose rows it has: also when it is computed again for the backward pass."""

    def forward(self, *args, packed_seq_params: PackedSeqParams | None = None, **kwargs):
        record = getattr(packed_seq_params, "record", packed_seq_params)
        with self.mlp.router.reading(record):
            return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
