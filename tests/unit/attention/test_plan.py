"""The attention plan covers exactly the visible pairs of rows, in at most two calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.attention.kernels import KERNELS
from megatron_ext.attention.plan import Rectangle, plan_attention
from megatron_ext.attention.reference import attention_mask
from megatron_ext.grouping import PrefixGroups
from tests.layouts import Lengths, spans
from tests.strategies import lengths_strategy
from tests.unit.attention.comparison import scores_of_plan

pads = st.sampled_from([1, 8, 16])


def visible_pairs(lengths: Lengths, total: int) -> torch.Tensor:
    """bool [t, t] from first principles: a document's row sees the document's rows up to itself."""
    mask = torch.zeros(total, total, dtype=torch.bool)
    real = 0
    for prefix, responses in spans(lengths):
        for document in [list(prefix), *([*prefix, *r] for r in responses)]:
            for i, row in enumerate(document):
                mask[row, document[: i + 1]] = True
        real += len(prefix) + sum(map(len, responses))
    for row in range(real, total):  # the pad is a document of its own
        mask[row, real : row + 1] = True
    return mask


@given(lengths_strategy, pads)
def test_plan_and_reference_mask_cover_the_visible_pairs_exactly_once(lengths: Lengths, pad: int):
    groups = PrefixGroups.from_lengths(lengths, pad)
    expected = visible_pairs(lengths, groups.num_tokens)
    plan = plan_attention(groups)
    assert torch.equal(scores_of_plan(plan, groups.num_tokens, groups.num_tokens), expected.long())
    assert plan.num_scores == int(expected.sum())
    assert torch.equal(attention_mask(groups), expected)
    assert bool(attention_mask(groups).any(1).all())  # no row without a key, the pad's included


@given(lengths_strategy, pads)
def test_two_calls_and_the_first_covers_every_row_once(lengths: Lengths, pad: int):
    """However many groups; and a prefix's keys appear once in the second call, never once per response."""
    groups = PrefixGroups.from_lengths(lengths, pad)
    plan = plan_attention(groups).calls
    shared = [g for g, (p, s) in enumerate(lengths) if p and sum(n > 0 for n in s) > 1]
    assert len(plan) == (2 if shared else 1)
    first = plan[0]
    assert first.causal
    queries = [row for r in first.rectangles for row in range(r.q_start, r.q_start + r.q_len)]
    keys = [row for r in first.rectangles for row in range(r.k_start, r.k_start + r.k_len)]
    assert queries == keys == list(range(groups.num_tokens))
    if shared:
        assert not plan[1].causal
        rows = spans(lengths)
        assert [(r.k_start, r.k_len) for r in plan[1].rectangles] == [
            (rows[g][0].start, len(rows[g][0])) for g in shared
        ]
        assert [r.q_len for r in plan[1].rectangles] == [sum(lengths[g][1]) for g in shared]


def test_a_single_response_is_fused_with_its_prefix():
    """One causal document, one call: the plain form of a batch costs what plain attention costs."""
    (call,) = plan_attention(PrefixGroups.from_lengths([(7, [4]), (3, [0, 5, 0])])).calls
    assert call.rectangles == (Rectangle(0, 11, 0, 11), Rectangle(11, 8, 11, 8))


def test_grouping_lowers_the_number_of_scores():
    """The FLOP count of the paper: G(P+S)^2/2 becomes P^2/2 + G S(2P+S)/2, diagonals apart."""
    p, s, g = 40, 6, 8
    groups = PrefixGroups.from_lengths([(p, [s] * g)])
    shared = plan_attention(groups).num_scores
    repeated = plan_attention(groups.repeated()).num_scores
    assert shared == p * (p + 1) // 2 + g * (s * p + s * (s + 1) // 2)
    assert repeated == g * (p + s) * (p + s + 1) // 2


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([(5, [3, 3, 3, 3])], [(5, 1), (3, 4)]),
        ([(4, [4, 4])], [(4, 3)]),  # a prefix as long as its responses joins their run
        ([(5, [3, 3, 2, 3])], [(5, 1), (3, 2), (2, 1), (3, 1)]),
        ([(5, [2, 2]), (5, [2, 2])], [(5, 1), (2, 2), (5, 1), (2, 2)]),
    ],
)
def test_equal_neighbours_form_runs(lengths, runs):
    first = plan_attention(PrefixGroups.from_lengths(lengths)).calls[0]
    assert [(run.first.q_len, run.count) for run in first.runs] == runs


@given(lengths_strategy, pads)
def test_runs_stand_for_the_same_rectangles(lengths: Lengths, pad: int):
    for call in plan_attention(PrefixGroups.from_lengths(lengths, pad)).calls:
        expanded = [
            Rectangle(
                run.first.q_start + i * run.q_step, run.first.q_len, run.first.k_start + i * run.k_step, run.first.k_len
            )
            for run in call.runs
            for i in range(run.count)
        ]
        assert tuple(expanded) == call.rectangles


@given(lengths_strategy, pads)
def test_packed_pieces_take_the_rows_of_the_rectangles(lengths: Lengths, pad: int):
    """What the variable-length kernels of a GPU are handed: rows back to back, borders beside them."""
    groups = PrefixGroups.from_lengths(lengths, pad)
    rows = torch.arange(groups.num_tokens)
    for call in plan_attention(groups).calls:
        (piece,) = KERNELS["torch_flash"].pieces(call, torch.device("cpu"))
        for side, taken, borders, longest in (
            ("q", piece.take_q(rows), piece.cu_seqlens_q, piece.max_seqlen_q),
            ("k", piece.take_k(rows), piece.cu_seqlens_k, piece.max_seqlen_k),
        ):
            spans_ = [(getattr(r, f"{side}_start"), getattr(r, f"{side}_len")) for r in call.rectangles]
            assert taken.tolist() == [row for start, length in spans_ for row in range(start, start + length)]
            lengths_ = [length for _, length in spans_]
            assert borders.tolist() == [0, *torch.tensor(lengths_).cumsum(0).tolist()] and longest == max(lengths_)
            assert borders.dtype == torch.int32
