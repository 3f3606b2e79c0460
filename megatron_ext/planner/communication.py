"""Bytes that one rank sends in one step, by kind, and the links each kind takes.

Ranks are numbered as Megatron does: tensor first, then context, data and pipeline. Collectives are rings: of x bytes over
r ranks, an all-gather or reduce-scatter sends x (r - 1) / r from each rank, an all-reduce twice that. Rings are laid node
by node, and every GPU has a NIC of its own. A group with k members in each of its nodes has k rings, each of which
carries its part and crosses a node's border through another member's NIC: together they are as fast as k NICs.

Symbols: t rows of the stream on this context-parallel rank, h hidden size, L layers of the stage with
most, e bytes of a number.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from megatron_ext.planner.activations import projected_width
from megatron_ext.planner.hardware import Hardware
from megatron_ext.planner.job import Job, MicrobatchShape
from megatron_ext.planner.parameters import layers_of_stage, trained_of_stage

__all__ = ["Traffic", "data_traffic", "members_per_node", "neighbours", "pass_traffic", "ring"]

FP32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one rank, in how many collectives, over a group of this many ranks.

    Attributes:
        kind: tensor, context, expert, pipeline or data.
        per_node: members of the group in each of its nodes, see `members_per_node`.
        exchange: an all-to-all, not a ring: what a rank has for ranks of other nodes leaves by its own NIC.
    """

    kind: str
    sent: float
    collectives: float
    ranks: int
    per_node: int
    exchange: bool = False

    def times(self, factor: float) -> Traffic:
        return dataclasses.replace(self, sent=factor * self.sent, collectives=factor * self.collectives)

    def bandwidth(self, hardware: Hardware) -> float:
        """Bytes per second at which a rank sends, at the links' full speed."""
        if self.per_node == self.ranks:
            return hardware.node_link
        if self.exchange:
            outside = (self.ranks - self.per_node) / (self.ranks - 1)
            return min(hardware.node_link, hardware.network_link / outside)
        return min(hardware.node_link, hardware.network_link * self.per_node)


def pass_traffic(job: Job, microbatch: MicrobatchShape, backward: bool) -> list[Traffic]:
    """One microbatch through one stage: forward, or forward and backward with what is recomputed.

    Embedding and vocabulary count as the stage's: of several stages this is a little more than the busiest sends.
    """
    config = job.model
    tp, pp, cp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size, config.context_parallel_size
    t, h, e = microbatch.shape.tokens, config.hidden_size, config.dtype.itemsize
    layers = max(config.pipeline_split.counts())
    again = backward and config.activations_checkpoint_granularity == "full"
    forwards = 1 + again
    found = []
    if tp > 1:
        # With sequence parallelism a forward has 2 gathers and 2 scatters; backward 2 gathers and 2 scatters of
        # gradients, and 2 gathers of inputs. Without, 2 all-reduces each way: as many bytes as 4.
        count = 4 * forwards + (6 if config.sequence_parallel else 4) * backward
        calls = count if config.sequence_parallel else count // 2
        # The embedding sums its shards; the vocabulary gets all predicting rows and sums their gradients.
        ends = (1 + backward) * (t + microbatch.shape.predicted) if config.sequence_parallel else 2 * t
        if backward and not config.sequence_parallel:
            ends += 2 * microbatch.shape.predicted
        sent = (count * layers * t + ends) * h * e
        if config.shares_key_value_heads:  # gathers of the projections, and scatters of their gradients
            count = forwards + backward
            sent += count * layers * t * projected_width(config) * e
            calls += count
        found.append(ring(job, "tensor", sent, calls * layers + 4))
    if cp > 1:
        found.append(_context(job, microbatch, layers, forwards, backward))
    if config.expert_model_parallel_size > 1:
        # Tokens on their way to experts and back, with their weights; backward the same the other way.
        has = config.layers_with_experts
        with_experts = max(sum(has[layer] for layer in layers_of_stage(config, stage)) for stage in range(pp))
        count = 2 * (forwards + backward) * with_experts
        sent = count * -(-t // tp) * config.moe_router_topk * h * e
        found.append(ring(job, "expert", sent, count, exchange=True))
    if pp > 1:
        rows = t // tp if config.sequence_parallel else t
        count = (1 + backward) * config.pipeline_split.pieces
        found.append(neighbours(job, count * rows * h * e, count))
    return found


def _context(job: Job, microbatch: MicrobatchShape, layers: int, forwards: int, backward: bool) -> Traffic:
    config = job.model
    d, e = config.kv_channels, config.dtype.itemsize
    n, m = config.heads_per_rank
    if config.cp_comm_type == "a2a":
        passes = forwards + backward
        sent = passes * microbatch.shape.tokens * (2 * n + 2 * m) * d * e
        return ring(job, "context", layers * sent, layers * 4 * passes, exchange=True)
    rows = microbatch.shape.gathered * config.cached_channels
    # Backward gathers again, but for compressed rows, and sums gradients in fp32.
    gathers = forwards + (backward and not config.multi_latent_attention)
    sent = rows * (gathers * e + backward * FP32)
    return ring(job, "context", layers * sent, layers * (gathers + backward))


def data_traffic(job: Job, stage: int) -> list[Traffic]:
    """Of one optimizer step: gradients in fp32, and, where the optimizer is sharded, the new parameters."""
    config = job.model
    if job.data_parallel * config.context_parallel_size == 1:
        return []
    # A reduce-scatter and a gather of parameters, or an all-reduce.
    each = FP32 + config.dtype.itemsize if job.distributed_optimizer else 2 * FP32
    trained, apart = trained_of_stage(config, stage, job.blocks), config.expert_model_parallel_size > 1
    found = [ring(job, "data", each * sum(p.numel for p in trained if not (apart and p.expert)), 2)]
    if apart and job.expert_replicas > 1:
        found.append(ring(job, "data of experts", each * sum(p.numel for p in trained if p.expert), 2))
    return found


def ring(job: Job, kind: str, total: float, collectives: float, exchange: bool = False) -> Traffic:
    """Collectives over the group of this kind that spread, all in all, `total` bytes."""
    stride, ranks = _group(job, kind)
    per_node = members_per_node(stride, ranks, job.world, job.devices)
    return Traffic(kind, total * (ranks - 1) / ranks, collectives, ranks, per_node, exchange)


def neighbours(job: Job, sent: float, count: float) -> Traffic:
    """Sends from a pipeline stage to the next, over one link: stages lie world / pp ranks apart, so that on several nodes
    some neighbours are in different ones."""
    return Traffic("pipeline", sent, count, 2, 2 if job.nodes == 1 else 1)


def _group(job: Job, kind: str) -> tuple[int, int]:
    """How far a group's ranks lie apart, and how many there are; gradients are summed over context ranks, too."""
    tp, cp = job.model.tensor_model_parallel_size, job.model.context_parallel_size
    etp, ep = job.model.expert_tensor_ranks, job.model.expert_model_parallel_size
    return {
        "tensor": (1, tp),
        "context": (tp, cp),
        "data": (tp, cp * job.data_parallel),
        "expert": (etp, ep),
        "data of experts": (etp * ep, job.expert_replicas),
    }[kind]


@lru_cache(maxsize=1024)
def members_per_node(stride: int, ranks: int, world: int, devices: int) -> int:
    """The fewest members that a group of `ranks` ranks, `stride` apart, has in one of its nodes. It is `ranks` only where
    none of these groups leaves its node.

    Args:
        world: ranks of all nodes. devices: of each node.
    """
    fewest = ranks
    for first in range(0, world, stride * ranks):
        for offset in range(first, first + stride):
            held: dict[int, int] = {}
            for rank in range(offset, offset + stride * ranks, stride):
                held[rank // devices] = held.get(rank // devices, 0) + 1
            fewest = min(fewest, *held.values())
    return fewest
