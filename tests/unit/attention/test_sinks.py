"""Sinks: equal to one more column of every repeated sequence's softmax, in every kernel and form of plan, with all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.attention import Scoring, prefix_grouped_attention
from megatron_ext.attention.cache import DecodeStep, PrefillStep
from megatron_ext.attention.function import planned_attention, planned_attention_backward
from megatron_ext.attention.plan import plan_attention
from megatron_ext.attention.sinks import sinks_gradient
from megatron_ext.grouping import PrefixGroups
from tests.layouts import error, plain_tree_attention, randn
from tests.paged_cases import PagedCase, seen, write
from tests.strategies import nested_strategy
from tests.unit.attention.comparison import BOUND, draw, outputs_and_grads
from tests.varlen import VarlenKernel

FOREST = [(9, [(5, [4, (3, [2, 6])]), 7, (2, [3, 3])]), (0, [5]), (3, [])]
KERNELS = ("cpu", "blockwise", "reference")


def assert_all_close(found: list, expected: list) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), found, expected, strict=True):
        assert a.shape == b.shape
        assert error(a, b) <= BOUND, f"{name} differs by {error(a, b)}"


@settings(max_examples=40, deadline=None)
@given(
    nested_strategy,
    st.sampled_from([1, 16]),
    st.sampled_from([None, 0, 3, 100]),
    st.sampled_from([None, 0.7]),
    st.sampled_from(KERNELS),
    st.sampled_from(["levels", "one_call"]),
    st.integers(0, 2**31),
)
def test_equals_repeated_sequences(forest, pad, window, softcap, kernel, plan, seed):
    kernel = "blockwise" if softcap and kernel == "cpu" else kernel
    plan = "auto" if window is not None else plan
    groups, rng = PrefixGroups.from_lengths(forest, pad), torch.Generator().manual_seed(seed)
    inputs, grad = draw(rng, groups, 4, 2)
    inputs.append(2 * randn(rng, 4))
    scoring, rules = Scoring(16**-0.5, softcap, window), {"softcap": softcap, "window": window}
    found = outputs_and_grads(
        lambda q, k, v, sinks: prefix_grouped_attention(q, k, v, groups, scoring, kernel, plan, sinks), inputs, grad
    )
    plain = outputs_and_grads(
        lambda q, k, v, sinks: plain_tree_attention(q, k, v, forest, sinks=sinks, **rules), inputs, grad
    )
    assert_all_close(found, plain)


@pytest.mark.parametrize("one_call", [False, True])
def test_packed_rows_give_the_same_numbers(one_call, rng):
    """The executor over pieces as a GPU's kernels take them."""
    groups = PrefixGroups.from_lengths(FOREST, 16)
    inputs, grad = draw(rng, groups, 4, 2)
    sinks, plan, scoring = randn(rng, 4), plan_attention(groups, None, one_call), Scoring(0.25)
    out, lse = planned_attention(*inputs, plan, VarlenKernel(), scoring, sinks)
    full = torch.zeros_like(out)
    full[: len(grad)] = grad
    grads = planned_attention_backward(full, *inputs, out, lse, plan, VarlenKernel(), scoring, True)
    plain = outputs_and_grads(lambda q, k, v, s: plain_tree_attention(q, k, v, FOREST, sinks=s), [*inputs, sinks], grad)
    assert_all_close([out[: len(grad)], *grads, sinks_gradient(full, out, lse, sinks)], plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_no_more_than_plain_attention(dtype, rng):
    """With as many heads as make the norm of the sinks' gradient, one number a head, stable: of 8 its ratio came to 2.9. And
    with sinks that are alike: else the norm is that of the few largest."""
    forest = [(160, [90, 33, 90]), (20, [40] * 6)]
    groups = PrefixGroups.from_lengths(forest)
    inputs, grad = draw(rng, groups, 32, 8)
    low, low_grad = [x.to(dtype) for x in (*inputs, 0.1 * randn(rng, 32))], grad.to(dtype)

    def plain(q, k, v, sinks):
        return plain_tree_attention(q, k, v, forest, sinks=sinks)

    truth = outputs_and_grads(plain, [x.double() for x in low], low_grad.double())
    base = outputs_and_grads(plain, low, low_grad)
    found = outputs_and_grads(
        lambda q, k, v, sinks: prefix_grouped_attention(q, k, v, groups, sinks=sinks), low, low_grad
    )
    for name, a, b, c in zip(("out", "dq", "dk", "dv", "dsinks"), found, base, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - c).norm() <= (2 if name == "out" else 3) * (b.double() - c).norm(), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 4])
def test_flex_agrees_forward(window, rng):
    groups = PrefixGroups.from_lengths(FOREST, 16)
    (q, k, v), grad = draw(rng, groups, 4, 2)
    sinks = randn(rng, 4)
    found = prefix_grouped_attention(q, k, v, groups, Scoring(0.25, window=window), "flex", sinks=sinks)[: len(grad)]
    assert error(found, plain_tree_attention(q, k, v, FOREST, window=window, sinks=sinks)) <= BOUND


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("scoring", [Scoring(0.3), Scoring(0.3, window=40), Scoring(0.3, softcap=2.0)])
def test_a_decoded_row_has_its_sinks_once(scoring, by_kernel, rng, world, monkeypatch):
    """However many pages its keys are in; and one far above every score leaves nothing to see."""
    if by_kernel:  # what a GPU does, by a kernel that runs here
        monkeypatch.setattr("megatron_ext.attention.cache.plain_way", lambda kernel: False)
    case, sinks = PagedCase.draw(rng, 6, 2, 8, torch.float64), randn(rng, 6)
    sinks[5] = 3000
    there = write(case, world, heads_first=not by_kernel)
    kernel = "blockwise" if scoring.softcap and by_kernel else "auto"
    found = DecodeStep(there.pool, there.rows).attend(1, case.query, there.key, there.value, scoring, kernel, sinks)
    for row, query, path in zip(found, case.query, case.paths, strict=False):
        assert error(row, seen(query, path, scoring, sinks)) <= 1e-12
        assert not row[5].any() and row[:5].all()


def test_a_prefill_has_them_too(rng):
    groups = PrefixGroups.from_lengths(FOREST)
    (q, k, v), _ = draw(rng, groups, 4, 2)
    sinks = randn(rng, 4)
    found = PrefillStep(groups).attend(1, q, k, v, Scoring(0.25), sinks=sinks)
    assert error(found, plain_tree_attention(q, k, v, FOREST, sinks=sinks)) <= BOUND


def test_refuses_sinks_of_other_heads(rng):
    groups = PrefixGroups.from_lengths(FOREST)
    (q, k, v), _ = draw(rng, groups, 4, 2)
    with pytest.raises(ValueError, match=r"4 query heads have 4 sinks, got \(2,\)"):
        prefix_grouped_attention(q, k, v, groups, sinks=randn(rng, 2))
