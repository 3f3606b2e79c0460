"""Attention over prefix trees: exactly the visible pairs, a call per level, and the numbers of repeated sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.attention import prefix_grouped_attention
from megatron_ext.attention.plan import plan_attention
from megatron_ext.attention.reference import attention_mask
from megatron_ext.flops import attention_pairs, num_predicted, num_tokens
from megatron_ext.grouping import PrefixGroups
from tests.layouts import documents, plain_tree_attention, randn, random_nested
from tests.strategies import nested_strategy
from tests.unit.attention.comparison import assert_close, outputs_and_grads, scores_of_plan

BOUND = 1e-10


def depth(nested) -> int:
    return 0 if isinstance(nested, int) else max((1 + depth(c) for c in nested[1]), default=0)


def visible(forest, total: int) -> torch.Tensor:
    """bool [t, t]: on some path, the key is not after the query."""
    mask = torch.zeros(total, total, dtype=torch.bool)
    real = 0
    for rows, _ in documents(forest):
        for i, row in enumerate(rows):
            mask[row, rows[: i + 1]] = True
            real = max(real, row + 1)
    mask[real:, real:] = torch.ones(total - real, total - real, dtype=torch.bool).tril()
    return mask


@given(nested_strategy, st.sampled_from([1, 16]))
def test_plan_covers_the_visible_pairs_once_with_a_call_per_level(forest, pad):
    groups = PrefixGroups.from_lengths(forest, pad)
    plan, expected = plan_attention(groups), visible(forest, groups.num_tokens)
    assert torch.equal(scores_of_plan(plan, groups.num_tokens, groups.num_tokens), expected.long())
    assert torch.equal(attention_mask(groups), expected)
    assert len(plan.calls) <= 1 + max(depth(tree) for tree in forest)
    for call in plan.calls[1:]:
        ends = [0] + [r.q_start + r.q_len for r in call.rectangles]
        starts = [r.q_start for r in call.rectangles]
        assert all(start >= end for start, end in zip(starts, ends, strict=False)), "queries of a call are disjoint"


def test_calls_follow_depth_and_not_width():
    wide = (4, [(3, [(2, [1] * 9)] * 9)] * 9)
    assert len(plan_attention(PrefixGroups.from_lengths([wide] * 3)).calls) == 4


@pytest.mark.parametrize("trial", range(12))
def test_equals_repeated_sequences(attention_plan, trial, rng):
    forest = [random_nested(rng, depth=1 + trial % 4) for _ in range(2)]
    groups = PrefixGroups.from_lengths(forest, (1, 16)[trial % 2])
    inputs = [randn(rng, groups.num_tokens, heads, 16) for heads in (4, 2, 2)]
    grad = randn(rng, groups.num_tokens - groups.num_pad_tokens, 4, 16)
    found = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, attention_plan=attention_plan), inputs, grad
    )
    plain = outputs_and_grads(lambda q, k, v: plain_tree_attention(q, k, v, forest), inputs, grad)
    assert_close(found, plain)


def test_a_perturbed_token_changes_only_rows_that_may_see_it(attention_plan, rng):
    """Bitwise: rows off its paths, siblings among them, stay the same."""
    forest = [(9, [(5, [4, (3, [2, 6])]), 7, (2, [3, 3])])]
    groups = PrefixGroups.from_lengths(forest, 16)
    mask = attention_mask(groups)
    q, k, v = (randn(rng, groups.num_tokens, heads, 16) for heads in (4, 2, 2))
    before = prefix_grouped_attention(q, k, v, groups, attention_plan=attention_plan)
    for row in range(0, groups.num_tokens, 3):
        k2, v2 = k.clone(), v.clone()
        k2[row] += 1
        v2[row] -= 1
        changed = (
            (prefix_grouped_attention(q, k2, v2, groups, attention_plan=attention_plan) != before).flatten(1).any(1)
        )
        assert not bool((changed & ~mask[:, row]).any())
        assert bool(changed[row])


def test_deep_trees_in_bf16_round_once(attention_plan, rng):
    """Merged in fp32: the error does not grow with the number of levels beyond that of the repeated form."""
    chain = 8
    for _ in range(5):
        chain = (8, [8, chain])
    forest = [chain]
    groups = PrefixGroups.from_lengths(forest)
    inputs = [randn(rng, groups.num_tokens, heads, 32) for heads in (4, 2, 2)]
    grad = randn(rng, groups.num_tokens, 4, 32)
    exact = outputs_and_grads(lambda q, k, v: plain_tree_attention(q, k, v, forest), inputs, grad)
    low = [x.bfloat16() for x in inputs]
    found = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, attention_plan=attention_plan), low, grad.bfloat16()
    )
    flat = groups.repeated()
    rows = torch.tensor([r for path, ends in documents(forest) if ends for r in path])
    first = torch.tensor([rows.tolist().index(r) for r in range(groups.num_tokens)])
    out = prefix_grouped_attention(*(x[rows] for x in low), flat, attention_plan=attention_plan)[first]
    assert len(plan_attention(groups).calls) == 6
    # L2 norms: the largest single error is a matter of luck.
    assert (found[0].double() - exact[0]).norm() <= 2 * (out.double() - exact[0]).norm()


@given(nested_strategy)
def test_the_flops_count_what_the_plan_computes(forest):
    """A causal square of n rows has n^2 / 2 pairs there, n (n + 1) / 2 here. And repeated, the paths' squares."""
    groups = PrefixGroups.from_lengths(forest)
    computed = plan_attention(groups).num_scores
    assert attention_pairs(forest) == pytest.approx(computed - groups.num_tokens / 2)
    assert num_tokens(forest) == groups.num_tokens
    paths = [len(rows) for rows, ends in documents(forest) if ends]
    assert attention_pairs(forest, share_prefix=False) == pytest.approx(sum(n * n / 2 for n in paths))
    assert num_tokens(forest, share_prefix=False) == sum(paths) == groups.num_repeated_tokens
    assert num_predicted(forest) == len(groups.predict_index)
    assert num_predicted(forest, share_prefix=False) == groups.num_predicted_tokens
