"""Nothing inside a layer reads a tensor's value on the host: layouts are Python ints, index tables are made once.

On a GPU such a read would stall the launch queue (tests/gpu makes it an error there). Here every operation of a layer is
listed, forward and backward, and the ones that read values are looked for.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.attention import Scoring, prefix_grouped_attention
from megatron_ext.attention.kernels import KERNELS
from megatron_ext.attention.plan import plan_attention
from megatron_ext.grouping import PrefixGroups
from tests.layouts import randn

FORESTS = {
    "groups": [(301, [37, 150, 37]), (65, [29, 3])],
    "tree": [(9, [(5, [4, (3, [2, 6])]), 7, (2, [3, 3])])],
}
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")
COPIES = ("_to_copy", "lift_fresh")  # moving an index table to the device


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [None, 20], ids=["plain", "window"])
@pytest.mark.parametrize("name", FORESTS)
def test_a_layer_reads_no_value_and_moves_no_table(name, window, attention_plan, rng):
    if window is not None and attention_plan == "levels":
        attention_plan = "auto"
    groups = PrefixGroups.from_lengths(FORESTS[name], 16)
    leaves = [randn(rng, groups.num_tokens, heads, 16).requires_grad_() for heads in (4, 2, 2)]

    def layer() -> None:
        out = prefix_grouped_attention(*leaves, groups, Scoring(0.25, window=window), attention_plan=attention_plan)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    layer()  # makes the tables
    with Operations() as second:
        layer()
    assert any("flash_attention" in n for n in second.names) and any(n.endswith("backward") for n in second.names)
    assert not [n for n in second.names if n in READS + COPIES]


def test_a_read_would_be_seen():
    with Operations() as seen:
        bool(torch.ones(1).sum() > 0)
    assert "_local_scalar_dense" in seen.names or "is_nonzero" in seen.names


@pytest.mark.parametrize("name", FORESTS)
def test_records_plans_and_pieces_hold_python_ints(name, attention_plan):
    groups = PrefixGroups.from_lengths(FORESTS[name], 16)
    values: list = [groups.num_tokens, groups.num_pad_tokens]
    for tree in groups.trees:
        values += [*tree.lengths, *tree.starts, *tree.ends, *tree.first_positions]
    plan = plan_attention(groups, one_call=attention_plan == "one_call")
    for call in plan.calls:
        values += [x for r in call.rectangles for x in (r.q_start, r.q_len, r.k_start, r.k_len)]
        (piece,) = KERNELS["torch_flash"].pieces(call, torch.device("cpu"))
        values += [piece.max_seqlen_q, piece.max_seqlen_k]
    assert len(values) > 20 and all(type(v) is int for v in values)
