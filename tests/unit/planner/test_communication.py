"""What is sent, and how fast: volumes by hand, groups as Megatron makes them, links as a machine has them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_ext.planner import HARDWARE, Hardware
from megatron_ext.planner.communication import Traffic, data_traffic, members_per_node, pass_traffic, ring
from megatron_ext.planner.parameters import stage_parameters
from tests.unit.planner.cases import job

GB = 1e9
# 1000 GB/s within a node and 100 out of it.
ROUND = Hardware("round", 80e9, 1e15, 1e12, 1000 * GB, 100 * GB, 10 * GB, "made up")


def test_volumes_by_hand():
    """TP 2 with sequence parallelism: 4 times the stream forward and 6 backward in every layer, half of it sent."""
    one = job({"tensor_model_parallel_size": 2, "sequence_parallel": True}, groups=4)
    (microbatch,) = one.microbatches
    t, h = 1024 + 8 * 256, 2048
    assert microbatch.shape.tokens == t
    (forward,), (both,) = (pass_traffic(one, microbatch, backward) for backward in (False, True))
    u = 8 * 256
    assert forward.sent == (16 * 4 * t + t + u) * h * 2 / 2
    assert both.sent == (16 * 10 * t + 2 * (t + u)) * h * 2 / 2
    (data,) = data_traffic(one, 0)
    count = sum(p.numel for p in stage_parameters(one.model, 0))
    assert data.sent == pytest.approx(count * (4 + 2) * 3 / 4)  # 4 data-parallel ranks


@pytest.mark.parametrize(
    ("stride", "ranks", "world", "devices", "members"),
    [
        (1, 8, 8, 8, 8),  # TP 8 on one node
        (1, 8, 16, 8, 8),  # on two: each group has a node
        (1, 8, 16, 4, 4),  # on nodes of 4: each group has two
        (2, 8, 16, 8, 4),  # gradients of TP 2 on 2 x 8
        (1, 16, 16, 8, 8),  # and of TP 1
        (8, 16, 128, 8, 1),  # and of TP 8 on 16 x 8
        (1, 4, 12, 6, 2),  # TP 4 on 2 x 6: ranks 4 to 7 lie two by two
        (1, 4, 20, 10, 2),
        (1, 3, 12, 4, 1),  # ranks 3 | 4 5
        (1, 3, 12, 6, 3),
    ],
)
def test_members_of_a_node_by_hand(stride, ranks, world, devices, members):
    assert members_per_node(stride, ranks, world, devices) == members


def test_members_of_a_node_are_those_of_megatrons_groups():
    """Drawn layouts, on nodes whose GPUs need not divide by anything."""
    draw = random.Random()
    for _ in range(100):
        tp, cp, dp, pp = (draw.choice([1, 2, 3, 4]) for _ in range(4))
        world = tp * cp * dp * pp
        devices = draw.choice([d for d in range(1, world + 1) if world % d == 0])
        sizes = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp,
            "num_layers": 12,
            "num_attention_heads": 12,
            "num_query_groups": 12,
            "kv_channels": 64,
            "ffn_hidden_size": 6144,
        }
        made = job(sizes, nodes=world // devices, devices=devices, groups=dp)
        megatron = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
        for kind, token in (("tensor", "tp"), ("context", "cp"), ("data", "dp-cp")):
            groups = megatron.get_ranks(token)
            members = min(min(Counter(rank // devices for rank in group).values()) for group in groups)
            traffic = ring(made, kind, 1.0, 1)
            assert (traffic.ranks, traffic.per_node) == (len(groups[0]), members), (kind, sizes, devices)
            whole = all(len({rank // devices for rank in group}) == 1 for group in groups)
            assert (traffic.per_node == traffic.ranks) == whole


def test_gradients_leave_a_node_by_the_nics_of_all_members():
    """TP 2 on 2 x 8 H100: four data-parallel ranks of a node share a ring's bytes, 4 x 400 Gb/s. TP 8: one NIC."""
    for tp, nodes, speed in ((2, 1, 450), (2, 2, 200), (8, 2, 50), (1, 2, 400), (4, 16, 100)):
        sizes = {"tensor_model_parallel_size": tp} if tp > 1 else {}
        (data,) = data_traffic(job(sizes, nodes=nodes, groups=8 * nodes), 0)
        assert data.bandwidth(HARDWARE["H100"]) == speed * GB, (tp, nodes)


def test_a_ring_is_never_faster_than_its_links_in_a_node():
    for members, speed in ((1, 100), (4, 400), (10, 1000), (16, 1000), (32, 1000)):
        assert Traffic("data", 1.0, 1, 32, members).bandwidth(ROUND) == speed * GB


def test_an_all_to_all_leaves_a_node_by_its_own_nic():
    """8 ranks, 4 of them in a node: 4 of the 7 others are elsewhere, so 4/7 of the bytes take the NIC."""
    assert Traffic("context", 7.0, 1, 8, 4, exchange=True).bandwidth(ROUND) == pytest.approx(175 * GB)
    assert Traffic("context", 7.0, 1, 8, 1, exchange=True).bandwidth(ROUND) == 100 * GB
    assert Traffic("context", 7.0, 1, 8, 8, exchange=True).bandwidth(ROUND) == 1000 * GB
    sizes = {"context_parallel_size": 8, "cp_comm_type": "a2a"}
    one = job(sizes, nodes=2, devices=4, groups=1)
    (context,) = pass_traffic(one, one.microbatches[0], False)
    assert (context.ranks, context.per_node, context.exchange) == (8, 4, True)


@pytest.mark.parametrize(("nodes", "speed"), [(1, 1000), (2, 100), (4, 100)])
def test_pipeline_neighbours_have_one_link(nodes, speed):
    staged = job({"pipeline_model_parallel_size": 4}, nodes=nodes, devices=8 // nodes)
    (pipeline,) = pass_traffic(staged, staged.microbatches[0], True)
    assert pipeline.kind == "pipeline" and pipeline.bandwidth(ROUND) == speed * GB
