"""Partial results merged: torch and Triton against fp64. The Triton kernel runs in Triton's interpreter, on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_ext.attention import function, merge, prefix_grouped_attention
from megatron_ext.attention.pieces import PackedPiece
from megatron_ext.attention.plan import plan_attention
from megatron_ext.attention.sinks import add_sinks
from megatron_ext.grouping import PrefixGroups
from tests.layouts import randn

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
# Rows below one prompt are contiguous, those below several are not: a slice and an index.
FORESTS = {"slice": [(9, [4, 7, 3])], "index": [(9, [4, 7]), (5, [2, 2, 8]), (3, [])]}


@pytest.fixture(scope="module")
def interpreted():
    """A copy of the module `merge_triton` that Triton interprets instead of compiling."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec("megatron_ext.attention.merge_triton")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    patch.undo()


@pytest.fixture(scope="module")
def merge_rows(interpreted):
    return interpreted.merge_rows


def parts(rng, forest, n: int, d: int, dtype: torch.dtype):
    """The second call's piece; out, lse of all rows and part, part_lse of its rows, as an lse [n, rows] transposed."""
    groups = PrefixGroups.from_lengths(forest)
    piece = PackedPiece(plan_attention(groups).calls[1], torch.device("cpu"))
    rows = len(piece.take_q(torch.arange(groups.num_tokens)))
    out, part = (randn(rng, r, n, d).to(dtype) for r in (groups.num_tokens, rows))
    lse, part_lse = (randn(rng, r, n).float() * 8 for r in (groups.num_tokens, rows))
    return piece, out, lse, part, part_lse.t().contiguous().t()


# Triton's interpreter cuts bf16 off where a GPU rounds.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
@pytest.mark.parametrize(("n", "d"), [(4, 16), (3, 24)])
@pytest.mark.parametrize("how", ["torch", "triton"])
def test_equals_the_rule_in_fp64(how, n, d, forest, dtype, bound, rng, merge_rows):
    piece, out, lse, part, part_lse = parts(rng, forest, n, d, dtype)
    kept, kept_lse = out.clone(), lse.clone()
    one, two = piece.take_q(lse).double(), part_lse.double()
    expected_lse = torch.logaddexp(one, two)
    expected = piece.take_q(out).double() * (one - expected_lse).exp().unsqueeze(-1)
    expected += part.double() * (two - expected_lse).exp().unsqueeze(-1)
    if how == "triton":
        merge_rows(out, lse, part, part_lse, piece.q_rows)
    else:
        merge._merge_with_torch(piece, out, lse, part, part_lse)
    error = (piece.take_q(out).double() - expected).abs()
    assert bool((error <= bound * (1 + expected.abs())).all())
    assert bool(((piece.take_q(lse).double() - expected_lse).abs() <= 2e-6 * (1 + expected_lse.abs())).all())
    others = torch.ones(len(out), dtype=torch.bool)
    others[piece.q_rows] = False
    assert torch.equal(out[others], kept[others]) and torch.equal(lse[others], kept_lse[others])


def test_far_apart_results_neither_overflow_nor_vanish(rng, merge_rows):
    piece, out, lse, part, part_lse = parts(rng, FORESTS["slice"], 4, 16, torch.float32)
    first = piece.take_q(out).clone()
    lse += 2000
    merge_rows(out, lse, part, part_lse, piece.q_rows)
    assert torch.equal(piece.take_q(out), first), "a part with no weight changes nothing"
    merge_rows(out, lse, part, part_lse + 9000, piece.q_rows)
    assert torch.equal(piece.take_q(out), part)


def test_no_rows_is_no_work(rng, merge_rows):
    _, out, lse, part, part_lse = parts(rng, FORESTS["slice"], 4, 16, torch.float32)
    kept = out.clone()
    merge_rows(out, lse, part[:0], part_lse[:0], slice(0, 0))
    assert torch.equal(out, kept)


def test_the_cpu_merges_with_torch():
    assert merge.select_merge(torch.device("cpu")) is merge._merge_with_torch


def test_what_a_gpu_merges_with_takes_strided_pieces_too(monkeypatch, rng):
    """The blockwise kernel's, on a GPU: by torch."""
    forest = FORESTS["index"]
    groups = PrefixGroups.from_lengths(forest)
    q, k, v = (randn(rng, groups.num_tokens, heads, 8) for heads in (4, 2, 2))
    expected = prefix_grouped_attention(q, k, v, groups, attention_kernel="blockwise", attention_plan="levels")
    monkeypatch.setattr(function, "select_merge", lambda device: merge._merge_with_triton)
    found = prefix_grouped_attention(q, k, v, groups, attention_kernel="blockwise", attention_plan="levels")
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("how", ["torch", "triton"])
def test_sinks_join_as_one_more_term(how, dtype, bound, rng, interpreted):
    """With sinks far below and far above, too: nothing, or all."""
    out, lse = randn(rng, 9, 5, 24).to(dtype), (randn(rng, 5, 9).float() * 8).t()
    sinks = (randn(rng, 5) * 8).to(dtype)
    sinks[3], sinks[4] = -5000, 5000
    one = lse.double()
    expected_lse = torch.logaddexp(one, sinks.double())
    expected = out.double() * (one - expected_lse).exp().unsqueeze(-1)
    kept = out.clone()
    (interpreted.sink_rows if how == "triton" else add_sinks)(out, lse, sinks)
    assert bool(((out.double() - expected).abs() <= bound * (1 + expected.abs())).all())
    assert bool(((lse.double() - expected_lse).abs() <= 2e-6 * (1 + expected_lse.abs())).all())
    assert torch.equal(out[:, 3], kept[:, 3]) and not out[:, 4].any()
