"""Seconds of a step, by hand, on a machine of round numbers that reaches its peak and answers at once."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from megatron_ext.planner import estimate
from tests.unit.planner.cases import PERFECT, ROUND, job


def test_seconds_by_hand():
    """TP 2 over 2 nodes of 4: four data-parallel ranks, two in each node, with two groups of 1024 + 8 x 256 each."""
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    step = estimate(job(sizes, nodes=2, devices=4, groups=8, rollout=False), ROUND, PERFECT).step
    rows, predicted, width, vocabulary = 3072, 2048, 2048, 128256
    linear = 2 * rows * 16 * (2048 * 3072 + 2048 * 2048 + 3 * 2048 * 8192)
    pairs = 1024**2 // 2 + 8 * (256**2 // 2 + 256 * 1024)
    attention = 16 * 4 * 32 * 64 * pairs
    logits = 2 * predicted * width * vocabulary
    # Half of what a layer's 4 (forward) or 10 collectives spread, of the embedding's one and of the vocabulary's.
    told = (16 * 4 * rows + rows + predicted) * width * 2 / 2
    told_both = (16 * 10 * rows + 2 * (rows + predicted)) * width * 2 / 2
    forward = (linear + attention + logits) / 2 / 1e15 + told / 1e12
    both = (3 * linear + 3 * attention + 4 * logits) / 2 / 1e15 + told_both / 1e12
    assert step.scoring == pytest.approx(2 * 2 * forward)
    assert step.training == pytest.approx(2 * both)
    parameters = (vocabulary * 2048 + 16 * (2048 * 3072 + 2048 * 2048 + 3 * 2048 * 8192)) // 2 + 33 * 2048
    # fp32 gradients and bf16 parameters, over two NICs.
    assert step.data == pytest.approx(parameters * (4 + 2) * 3 / 4 / 2e11)
    # Two moments and the fp32 weights read and written, the gradient read, the parameter written.
    assert step.optimizer == pytest.approx(parameters / 4 * (6 * 4 + 4 + 2) / 1e12)
    assert (step.sampling, step.bubble) == (0, 0)
    assert step.total == pytest.approx(2 * 2 * forward + 2 * both + step.data + step.optimizer)
    assert step.flops == pytest.approx(8 * (2 * (linear + attention + logits) + 3 * (linear + attention + logits)))


def test_a_collective_takes_its_time_however_small():
    """20 us, and 3 us for each further rank of the ring: 16 layers of 2 collectives forward, and 4 at the ends."""
    slow = dataclasses.replace(PERFECT, collective_latency=20e-6, ring_latency=3e-6)
    sizes = {"tensor_model_parallel_size": 4}
    fast, late = (estimate(job(sizes, groups=2, scoring_passes=1), ROUND, a).step for a in (PERFECT, slow))
    assert late.scoring - fast.scoring == pytest.approx((16 * 2 + 4) * (20e-6 + 3 * 3e-6))
    assert late.data - fast.data == pytest.approx(2 * (20e-6 + 3e-6))


def test_a_pipeline_waits_for_its_stages():
    """m microbatches over p stages take the time of m + p - 1: the bubble is p - 1 of them, for every run."""
    draw = random.Random()
    stages, groups = draw.choice([2, 4, 8]), 8 * draw.randint(1, 4)
    estimated = estimate(job({"pipeline_model_parallel_size": stages}, groups=groups, scoring_passes=0))
    count = len(estimated.job.microbatches)
    assert count == groups * stages // 8
    assert estimated.step.bubble == pytest.approx(estimated.step.training * (stages - 1) / count)
    assert estimate(job(groups=groups)).step.bubble == 0


def test_a_scoring_pass_waits_once_for_all_updates():
    """Two passes over the 12 microbatches of three updates, then three runs over 4: 3 stages wait in each of the five."""
    estimated = estimate(job({"pipeline_model_parallel_size": 4}, groups=8, updates=3, scoring_passes=2))
    assert len(estimated.job.microbatches) == 4
    forward, both = estimated.step.scoring / (2 * 12), estimated.step.training / 12
    assert estimated.step.bubble == pytest.approx(3 * (2 * forward + 3 * both))


@pytest.mark.parametrize(("nodes", "devices", "link"), [(1, 2, 1e12), (2, 1, 1e11)])
def test_sampling_tells_every_token_by_hand(nodes, devices, link):
    """64 responses of 256 tokens at once; what is told is what links of no bandwidth limit save."""
    rows, width, tokens = 8 * 8, 2048, 256
    endless = dataclasses.replace(ROUND, node_link=math.inf, network_link=math.inf)

    def told(sizes):
        made = job(sizes, nodes=nodes, devices=devices, groups=8)
        limited, free = (estimate(made, hardware, PERFECT).step.sampling for hardware in (ROUND, endless))
        return limited - free

    # One send from stage to stage; two all-reduces in each of 16 layers, of which a ring of two sends all bytes once.
    assert told({"pipeline_model_parallel_size": 2}) == pytest.approx(tokens * rows * width * 2 / link)
    assert told({"tensor_model_parallel_size": 2}) == pytest.approx(tokens * 16 * 2 * rows * width * 2 / link)
