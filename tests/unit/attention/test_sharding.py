"""Which rank holds what under context parallelism: worked out from lengths, for any stream and any number of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.attention import Scoring
from megatron_ext.attention.function import planned_attention, planned_attention_backward
from megatron_ext.attention.kernels import KERNELS
from megatron_ext.attention.plan import plan_attention
from megatron_ext.attention.reference import attention_mask
from megatron_ext.attention.sharding import shard_layout
from megatron_ext.grouping import PrefixGroups
from tests.layouts import plain_tree_attention
from tests.strategies import nested_strategy
from tests.unit.attention.comparison import assert_close, draw, outputs_and_grads, scores_of_plan
from tests.varlen import VarlenKernel

ranks_strategy = st.sampled_from([1, 2, 3, 4])


@given(nested_strategy, ranks_strategy, st.sampled_from([0.0, 50.0]), st.sampled_from([None, 0, 1, 5]))
def test_every_row_is_on_one_rank_and_every_pair_is_computed_once(forest, ranks, cost, window):
    """The ranks' plans together compute exactly the visible pairs, from the gathered rows and their own."""
    groups = PrefixGroups.from_lengths(forest)
    layout, total = shard_layout(groups.trees, ranks, cost), groups.num_tokens
    held = [row for spans in layout.spans for s in spans for row in range(s.start, s.start + s.length)]
    assert sorted(held) == list(range(total))
    gathered = [r for n in layout.cut for d in (layout.documents[n],) for r in range(d.start, d.start + d.length)]
    assert len(gathered) == layout.num_gathered
    count = torch.zeros(total, total, dtype=torch.long)
    for rank, spans in enumerate(layout.spans):
        mine = [row for s in spans for row in range(s.start, s.start + s.length)]
        assert len(mine) == layout.num_rows[rank]
        pad = 3
        size = len(gathered) + len(mine) + pad
        plan = layout.plan(rank, pad, window)
        scores = scores_of_plan(plan, len(mine) + pad, size)
        for i, row in enumerate(mine):
            count[row].index_add_(0, torch.tensor(gathered + mine), scores[i, : size - pad])
        assert not bool(scores[: len(mine), size - pad :].any()), "nobody sees the pad"
        assert len(plan.calls) <= len(plan_attention(groups, window).calls) + 1
    assert torch.equal(count, attention_mask(groups, window).long())


@given(nested_strategy, st.sampled_from([2, 3, 4]))
def test_only_what_others_need_is_cut(forest, ranks):
    """Prefixes, and responses longer than a rank's share; every other response is whole on one rank."""
    groups = PrefixGroups.from_lengths(forest)
    layout = shard_layout(groups.trees, ranks, 10.0)
    share = -(-groups.num_tokens // ranks)
    for number, document in enumerate(layout.documents):
        holders = {rank for rank, spans in enumerate(layout.spans) for p in spans if p.document == number}
        cut = number in layout.cut
        assert cut == (document.rows_below > 0 or document.length > share)
        assert cut or len(holders) == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_work_is_balanced(ranks):
    """Scores and rows of the busiest rank, for a prompt with many responses of unequal length."""
    lengths = [(4000, [311, 40, 502, 77, 256, 256, 130, 410, 90, 333, 12, 480])]
    groups = PrefixGroups.from_lengths(lengths)
    layout = shard_layout(groups.trees, ranks, 1000.0)
    scores = [layout.plan(rank, 0).num_scores for rank in range(ranks)]
    assert max(scores) <= 1.1 * sum(scores) / ranks
    assert max(layout.num_rows) <= 1.1 * sum(layout.num_rows) / ranks
    assert layout.num_gathered == 4000, "responses stay whole, and their keys at home"


def test_a_long_response_is_cut_too():
    groups = PrefixGroups.from_lengths([(40, [600, 8, 8])])
    layout = shard_layout(groups.trees, 2, 10.0)
    assert [layout.documents[n].length for n in layout.cut] == [40, 600]
    assert abs(layout.num_rows[0] - layout.num_rows[1]) <= 16


@settings(max_examples=40, deadline=None)
@given(nested_strategy, st.sampled_from([2, 3, 4]), st.sampled_from([None, 0, 3]), st.integers(0, 2**31))
def test_every_kernel_gives_each_ranks_share(forest, ranks, window, seed):
    """Outputs, and gradients added over ranks, from every rank's own plan over its own buffer of keys, in fp64.

    By the CPU's kernel, by explicit scores, and by packed rows as a GPU's kernels take them, where a level's key rows repeat.
    """
    groups = PrefixGroups.from_lengths(forest)
    layout, rng = shard_layout(groups.trees, ranks, 3.0), torch.Generator().manual_seed(seed)
    (q, k, v), grad = draw(rng, groups, 4, 2)
    scoring, pad = Scoring(0.25, window=window), 2
    rules = {"window": window}
    expected = outputs_and_grads(lambda *x: plain_tree_attention(*x, forest, **rules), [q, k, v], grad)
    gathered = [r for n in layout.cut for d in (layout.documents[n],) for r in range(d.start, d.start + d.length)]
    for kernel in (KERNELS["cpu"], KERNELS["blockwise"], VarlenKernel()):
        found = [torch.zeros_like(x) for x in expected]
        for rank, spans in enumerate(layout.spans):
            mine = [row for s in spans for row in range(s.start, s.start + s.length)]
            rows, buffer = mine + [0] * pad, gathered + mine + [0] * pad
            plan = layout.plan(rank, pad, window)
            out, lse = planned_attention(q[rows], k[buffer], v[buffer], plan, kernel, scoring)
            g = grad[rows].clone()
            g[len(mine) :] = 0
            dq, dk, dv = planned_attention_backward(g, q[rows], k[buffer], v[buffer], out, lse, plan, kernel, scoring)
            for total, part in ((found[0], out), (found[1], dq)):
                total[mine] += part[: len(mine)]
            for total, part in ((found[2], dk), (found[3], dv)):
                total.index_add_(0, torch.tensor(buffer), part)
        assert_close(found, expected)
