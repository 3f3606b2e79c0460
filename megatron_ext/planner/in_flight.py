"""Activations of the streams that wait for their backward pass on a pipeline stage, when most do by Megatron's schedules.

1F1B runs as many forward passes ahead as there are stages behind. The interleaved schedule runs a stage's pieces in turns, more
of them ahead, and frees no output that was sent on (`megatron_config`).
"""

from __future__ import annotations

from collections import Counter
from functools import cache

from megatron_ext.planner.activations import Activations
from megatron_ext.planner.job import Job
from megatron_ext.runtime.pieces import streams_per_turn

__all__ = ["in_flight", "waiting_passes"]


def in_flight(job: Job, stage: int, found: Activations) -> tuple[int, int]:
    """Bytes on the device and on the host.

    Args:
        found: of one stream; of a stage in pieces, of all of them.
    """
    config, split = job.model, job.model.pipeline_split
    if split.pieces == 1:
        waiting = min(len(job.microbatches), split.stages - stage)
        return waiting * found.kept, waiting * found.host * found.layers
    layers, last_stage = found.layers // split.pieces, stage == split.stages - 1
    rows = job.largest().shape.tokens // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    sent = rows * config.hidden_size * config.dtype.itemsize
    device = host = 0
    for first, between, last in waiting_passes(split.stages, stage, split.pieces, len(job.microbatches)):
        passes = first + between + last
        kept = passes * (found.layer * layers + found.shared) + first * found.input + last * found.output
        kept += (first + between if last_stage else passes) * sent
        device, host = max(device, kept), max(host, passes * layers * found.host)
    return device, host


@cache
def waiting_passes(stages: int, stage: int, pieces: int, streams: int) -> frozenset[tuple[int, int, int]]:
    """Passes of the first, of those between and of the last piece of a stage that wait for their backward pass, after each
    forward pass of the interleaved schedule."""
    streams = max(streams, stages)  # of fewer, the smallest runs again
    turn = streams_per_turn(streams, stages)
    order = []  # of the pieces' forward passes
    for start in range(0, streams, turn):
        order += [piece for piece in range(pieces) for _ in range(start, min(start + turn, streams))]
    ahead = 2 * (stages - stage - 1) + (pieces - 1) * turn
    waiting, found = Counter(), set()
    for number, piece in enumerate(order):
        waiting[piece] += 1
        first, last = waiting[0], waiting[pieces - 1]
        found.add((first, waiting.total() - first - last, last))
        if number >= ahead:
            waiting[pieces - 1 - order[number - ahead]] -= 1
    return frozenset(found)
