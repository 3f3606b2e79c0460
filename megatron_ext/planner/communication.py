"""Bytes that one rank sends in one step, by kind, and the link each kind takes.

Ranks are numbered as Megatron does: tensor first, then context, data and pipeline. A group of neighbours that fits into a
node stays there. Collectives are rings: of x bytes over r ranks, an all-gather or reduce-scatter sends x (r - 1) / r from
each rank, an all-reduce twice that.

Symbols: t rows of the stream on this context-parallel rank, h hidden size, L layers of the stage, e bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.planner.job import Job, Microbatch
from megatron_ext.planner.parameters import stage_parameters

__all__ = ["Traffic", "data_traffic", "pass_traffic"]

FP32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one rank, in how many collectives, over a group of this many ranks.

    Attributes:
        kind: tensor, context, pipeline or data.
        within_node: the group never leaves a node.
    """

    kind: str
    sent: float
    collectives: float
    ranks: int
    within_node: bool

    def times(self, factor: float) -> Traffic:
        return Traffic(self.kind, factor * self.sent, factor * self.collectives, self.ranks, self.within_node)


def pass_traffic(job: Job, microbatch: Microbatch, backward: bool) -> list[Traffic]:
    """One microbatch through one stage: forward, or forward and backward with what is recomputed.

    Embedding and vocabulary count as the stage's: of several stages this is a little more than the busiest sends.
    """
    config = job.model
    tp, pp, cp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size, config.context_parallel_size
    t, h, e = microbatch.shape.tokens, config.hidden_size, config.dtype.itemsize
    layers = config.num_layers // pp
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
        found.append(_ring("tensor", sent, calls * layers + 4, tp, job.devices >= tp))
    if cp > 1:
        found.append(_context(job, microbatch, layers, forwards, backward))
    if pp > 1:
        rows = t // tp if config.sequence_parallel else t
        count = 1 + backward
        inside = job.devices >= job.world  # neighbouring stages are world / pp ranks apart
        found.append(Traffic("pipeline", count * rows * h * e, count, 2, inside))
    return found


def _context(job: Job, microbatch: Microbatch, layers: int, forwards: int, backward: bool) -> Traffic:
    config = job.model
    tp, cp, d, e = (
        config.tensor_model_parallel_size,
        config.context_parallel_size,
        config.kv_channels,
        config.dtype.itemsize,
    )
    n, m = config.num_attention_heads // tp, config.num_query_groups // tp
    inside = tp * cp <= job.devices
    if config.cp_comm_type == "a2a":
        passes = forwards + backward
        sent = passes * microbatch.shape.tokens * (2 * n + 2 * m) * d * e
        return _ring("context", layers * sent, layers * 4 * passes, cp, inside)
    rows = microbatch.gathered * 2 * m * d
    gathers = forwards + backward  # backward gathers again, and sums gradients in fp32
    sent = rows * (gathers * e + backward * FP32)
    return _ring("context", layers * sent, layers * (gathers + backward), cp, inside)


def data_traffic(job: Job, stage: int) -> list[Traffic]:
    """Of one optimizer step: gradients in fp32, and, where the optimizer is sharded, the new parameters."""
    config = job.model
    ranks = job.data_parallel * config.context_parallel_size
    if ranks == 1:
        return []
    parameters = stage_parameters(config, stage)
    if job.block:
        layer = next(p.layer for p in parameters if p.layer is not None)
        parameters = [p for p in parameters if p.layer == layer]
    count = sum(p.numel for p in parameters)
    inside = config.tensor_model_parallel_size * ranks <= job.devices
    # A reduce-scatter and a gather of parameters, or an all-reduce.
    sent = count * (FP32 + config.dtype.itemsize if job.distributed_optimizer else 2 * FP32)
    return [_ring("data", sent, 2, ranks, inside)]


def _ring(kind: str, total: float, collectives: float, ranks: int, inside: bool) -> Traffic:
    return Traffic(kind, total * (ranks - 1) / ranks, collectives, ranks, inside)
