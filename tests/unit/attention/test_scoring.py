"""Sliding windows and soft caps: equal to the same rule on every repeated sequence, in every form of plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.attention import Scoring, prefix_grouped_attention
from megatron_ext.attention.function import planned_attention, planned_attention_backward
from megatron_ext.attention.kernels import KERNELS
from megatron_ext.attention.plan import plan_attention
from megatron_ext.attention.reference import attention_mask
from megatron_ext.flops import attention_pairs
from megatron_ext.grouping import PrefixGroups
from tests.layouts import documents, plain_tree_attention, random_nested
from tests.strategies import nested_strategy
from tests.unit.attention.comparison import assert_close, draw, outputs_and_grads, scores_of_plan
from tests.varlen import VarlenKernel

SCALE = 0.3
pads = st.sampled_from([1, 16])
seeds = st.integers(0, 2**31)
windows = st.sampled_from([None, 0, 1, 3, 8, 100])


def visible(forest, total: int, window: int | None) -> torch.Tensor:
    """bool [t, t] from first principles: on some path, the key is not after the query and not too far before it."""
    mask = torch.zeros(total, total, dtype=torch.bool)
    real = 0
    for rows, _ in documents(forest):
        for i, row in enumerate(rows):
            mask[row, rows[0 if window is None else max(0, i - window) : i + 1]] = True
            real = max(real, row + 1)
    pad = torch.ones(total - real, total - real, dtype=torch.bool).tril()
    mask[real:, real:] = pad if window is None else pad.triu(-window)
    return mask


@given(nested_strategy, pads, windows, st.booleans())
def test_every_form_of_plan_covers_the_visible_pairs_once(forest, pad, window, one_call):
    groups = PrefixGroups.from_lengths(forest, pad)
    plan, expected = plan_attention(groups, window, one_call), visible(forest, groups.num_tokens, window)
    assert torch.equal(scores_of_plan(plan, groups.num_tokens, groups.num_tokens), expected.long())
    assert torch.equal(attention_mask(groups, window), expected)
    assert plan.num_scores == int(expected.sum())
    if one_call or plan.copied is not None:
        assert len(plan.calls) == 1
    if window is not None and plan.copied is not None:
        parts = [s for tree in groups.trees for s in tree.lengths]
        assert sum(n for _, n in plan.copied) <= groups.num_tokens + window * len(parts), "no more than windows copied"


@given(nested_strategy, windows)
def test_the_flops_of_a_window_are_those_of_the_plan(forest, window):
    """A square of n rows has n^2 / 2 pairs there, n (n + 1) / 2 here."""
    groups = PrefixGroups.from_lengths(forest)
    computed = plan_attention(groups, window).num_scores
    assert attention_pairs(forest, window=window) == pytest.approx(computed - groups.num_tokens / 2)
    paths = [len(rows) for rows, ends in documents(forest) if ends]
    alone = sum(plan_attention(PrefixGroups.from_lengths([(n, [])]), window).num_scores - n / 2 for n in paths if n)
    assert attention_pairs(forest, share_prefix=False, window=window) == pytest.approx(alone)


@settings(max_examples=40, deadline=None)
@given(nested_strategy, pads, windows, st.sampled_from([None, 0.7, 20.0]), st.sampled_from([(4, 4), (6, 2)]), seeds)
def test_equals_repeated_sequences(forest, pad, window, softcap, heads, seed):
    groups = PrefixGroups.from_lengths(forest, pad)
    n, m = heads
    rng = torch.Generator().manual_seed(seed)
    inputs, grad = draw(rng, groups, n, m)
    scoring = Scoring(16**-0.5, softcap, window)
    found = outputs_and_grads(lambda q, k, v: prefix_grouped_attention(q, k, v, groups, scoring), inputs, grad)
    rules = {"softcap": softcap, "window": window}
    plain = outputs_and_grads(lambda q, k, v: plain_tree_attention(q, k, v, forest, **rules), inputs, grad)
    oracle = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, scoring, "reference"), inputs, grad
    )
    assert_close(found, plain)
    assert_close(oracle, plain)


@pytest.mark.parametrize("kernel", ["cpu", "blockwise"])
@pytest.mark.parametrize(("window", "one_call"), [(None, False), (None, True), (50, False), (300, False)])
def test_kernels_agree_where_rows_fill_several_blocks(kernel, window, one_call, rng):
    """Equal responses in one run, unequal ones, and rows that are no multiple of a block."""
    forest = [(301, [150, 150, 37]), (65, [(270, [9, 9]), 3])]
    groups = PrefixGroups.from_lengths(forest, 16)
    inputs, grad = draw(rng, groups, 4, 2)
    plan, scoring = plan_attention(groups, window, one_call), Scoring(SCALE, window=window)
    assert len(plan.calls) == (1 if one_call or window else 3)
    out, lse = planned_attention(*inputs, plan, KERNELS[kernel], scoring)
    full = torch.zeros_like(out)
    full[: len(grad)] = grad
    found = [out, *planned_attention_backward(full, *inputs, out, lse, plan, KERNELS[kernel], scoring, True)]
    plain = outputs_and_grads(
        lambda q, k, v: plain_tree_attention(q * SCALE * 4, k, v, forest, window=window), inputs, grad
    )
    found[0] = found[0][: len(grad)]
    assert_close(found, plain)


@settings(max_examples=30, deadline=None)
@given(
    nested_strategy,
    st.sampled_from([1, 16]),
    windows,
    st.booleans(),
    st.sampled_from([torch.float64, torch.bfloat16]),
    seeds,
)
def test_packed_rows_give_the_same_numbers(forest, pad, window, one_call, dtype, seed):
    """The executor over pieces as a GPU's kernels take them, in every form of plan."""
    groups = PrefixGroups.from_lengths(forest, pad)
    rng = torch.Generator().manual_seed(seed)
    inputs, grad = draw(rng, groups, 4, 2)
    low = [x.to(dtype) for x in inputs]
    plan, scoring = plan_attention(groups, window, one_call), Scoring(SCALE, window=window)
    kernel = VarlenKernel()
    out, lse = planned_attention(*low, plan, kernel, scoring)
    full = torch.zeros_like(out)
    full[: len(grad)] = grad.to(dtype)
    grads = planned_attention_backward(full, *low, out, lse, plan, kernel, scoring, True)
    plain = outputs_and_grads(
        lambda q, k, v: plain_tree_attention(q * SCALE * 4, k, v, forest, window=window),
        [x.double() for x in low],
        grad.to(dtype).double(),
    )
    for found, expected in zip((out[: len(grad)], *grads), plain, strict=True):
        bound = 1e-10 if dtype == torch.float64 else 0.02 * (1 + expected.abs().max())
        assert not expected.numel() or (found.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring", [Scoring(0.25, window=40), Scoring(0.25, softcap=2.0)], ids=["window", "softcap"])
def test_low_precision_errs_no_more_than_plain_attention(scoring, dtype, rng):
    forest = [(160, [90, 33, 90]), (20, [40] * 6)]
    groups = PrefixGroups.from_lengths(forest)
    inputs, grad = draw(rng, groups, 8, 2)
    low, low_grad = [x.to(dtype) for x in inputs], grad.to(dtype)
    rules = {"softcap": scoring.softcap, "window": scoring.window}

    def plain(q, k, v):
        return plain_tree_attention(q, k, v, forest, **rules)

    truth = outputs_and_grads(plain, [x.double() for x in low], low_grad.double())
    base = outputs_and_grads(plain, low, low_grad)
    found = outputs_and_grads(lambda q, k, v: prefix_grouped_attention(q, k, v, groups, scoring), low, low_grad)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), found, base, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - c).norm() <= (2 if name == "out" else 3) * (b.double() - c).norm(), name


def test_a_window_isolates_bitwise(rng):
    """Perturbing a key changes rows that may see it and no others."""
    forest = [(9, [(5, [4, (3, [2, 6])]), 7, (2, [3, 3])])]
    groups = PrefixGroups.from_lengths(forest, 16)
    (q, k, v), _ = draw(rng, groups, 4, 2)
    scoring = Scoring(0.25, window=6)
    mask = attention_mask(groups, scoring.window)
    before = prefix_grouped_attention(q, k, v, groups, scoring)
    for row in range(0, groups.num_tokens, 3):
        k2, v2 = k.clone(), v.clone()
        k2[row] += 1
        v2[row] -= 1
        changed = (prefix_grouped_attention(q, k2, v2, groups, scoring) != before).flatten(1).any(1)
        assert not bool((changed & ~mask[:, row]).any()) and bool(changed[row])


def test_the_blockwise_kernel_repeats_bitwise(rng):
    forest = [random_nested(rng, depth=3, largest=40)]
    groups = PrefixGroups.from_lengths(forest)
    inputs, grad = draw(rng, groups, 4, 2)
    scoring = Scoring(0.25, softcap=1.0)

    def run():
        return outputs_and_grads(
            lambda q, k, v: prefix_grouped_attention(q, k, v, groups, scoring, "blockwise"), inputs, grad
        )

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"softcap": 0.0}, "soft cap of attention scores must be above 0"), ({"window": -1}, "0 or more, got -1")],
)
def test_refuses_rules_without_meaning(fields, words):
    with pytest.raises(ValueError, match=words):
        Scoring(1.0, **fields)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
def test_flex_agrees_forward(softcap, window, rng):
    """On the CPU FlexAttention has no backward: the oracle of a GPU's tests, tried where it can run."""
    forest = [(9, [(5, [4, (3, [2, 6])]), 7, (2, [3, 3])]), (0, [5]), (3, [])]
    groups = PrefixGroups.from_lengths(forest, 16)
    (q, k, v), grad = draw(rng, groups, 4, 2)
    found = prefix_grouped_attention(q, k, v, groups, Scoring(0.25, softcap, window), "flex")[: len(grad)]
    plain = plain_tree_attention(q, k, v, forest, softcap=softcap, window=window)
    assert (found - plain).abs().max() <= 1e-10


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_takes_a_score_modifier(rng):
    """ALiBi by positions, against plain attention with the same bias."""
    from megatron_ext.attention.flex import flex_attention

    groups = PrefixGroups.from_lengths([(7, [5])])
    (q, k, v), _ = draw(rng, groups, 2, 2)
    position = groups.position_ids
    found = flex_attention(
        q, k, v, groups, Scoring(0.25), lambda score, b, h, i, j: score - 0.5 * (position[i] - position[j])
    )
    distance = (position[:, None] - position[None, :]).double()
    scores = (q.transpose(0, 1) @ k.permute(1, 2, 0) * 0.25 - 0.5 * distance).masked_fill(distance < 0, float("-inf"))
    assert (found - (scores.softmax(-1) @ v.transpose(0, 1)).transpose(0, 1)).abs().max() <= 1e-10
