"""Grouped attention equals repeated plain attention in fp64, outputs and every gradient, for any layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.attention import Scoring, prefix_grouped_attention
from megatron_ext.grouping import PrefixGroups
from tests.layouts import LAYOUTS, error, plain_attention, randn, random_lengths, spans
from tests.unit.attention.comparison import BOUND, assert_close, draw, outputs_and_grads

HEADS = [(4, 4), (8, 2), (3, 1)]  # query heads, key/value heads: plain, grouped 4:1, one shared


@pytest.mark.parametrize(("n", "m"), HEADS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_reference_and_repeated(attention_plan, name, n, m, rng):
    lengths, pad = LAYOUTS[name]
    groups = PrefixGroups.from_lengths(lengths, pad)
    inputs, grad = draw(rng, groups, n, m)
    found = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, attention_plan=attention_plan), inputs, grad
    )
    plain = outputs_and_grads(lambda q, k, v: plain_attention(q, k, v, lengths), inputs, grad)
    oracle = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, attention_kernel="reference"), inputs, grad
    )
    assert_close(found, plain)
    assert_close(oracle, plain)


@pytest.mark.parametrize("trial", range(8))
def test_random_layouts(attention_plan, trial, rng):
    lengths = random_lengths(rng)
    groups = PrefixGroups.from_lengths(lengths, pad_to_multiple=(1, 16)[trial % 2])
    inputs, grad = draw(rng, groups, 8, 2)
    found = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, attention_plan=attention_plan), inputs, grad
    )
    plain = outputs_and_grads(lambda q, k, v: plain_attention(q, k, v, lengths), inputs, grad)
    assert_close(found, plain)


def test_the_pad_is_a_document_of_its_own(attention_plan, rng):
    """Its rows stay finite, and a gradient on them reaches no other row."""
    groups = PrefixGroups.from_lengths([(5, [3, 2])], pad_to_multiple=16)
    real = groups.num_tokens - groups.num_pad_tokens
    inputs, _ = draw(rng, groups, 4, 2)
    grad = randn(rng, groups.num_tokens, 4, 16)
    grad[:real] = 0
    out, *grads = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, attention_plan=attention_plan), inputs, grad
    )
    oracle, *oracle_grads = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, attention_kernel="reference"), inputs, grad
    )
    assert_close([out, *grads], [oracle, *oracle_grads])
    for x in grads:
        assert torch.count_nonzero(x[:real]) == 0 and torch.count_nonzero(x[real:]) > 0


@pytest.mark.parametrize("scale", [0.07, 1.0])
def test_softmax_scale(attention_plan, scale, rng):
    lengths, pad = LAYOUTS["several groups, pad"]
    groups = PrefixGroups.from_lengths(lengths, pad)
    inputs, grad = draw(rng, groups, 4, 2)
    found = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, Scoring(scale), attention_plan=attention_plan),
        inputs,
        grad,
    )
    plain = outputs_and_grads(lambda q, k, v: plain_attention(q, k, v, lengths, scale), inputs, grad)
    default = prefix_grouped_attention(*inputs, groups, attention_plan=attention_plan)
    assert_close(found, plain)
    assert error(found[0], default[: len(grad)]) > 1e-3  # the scale matters here


@pytest.mark.parametrize("name", ["several groups, pad", "equal responses", "one response"])
def test_slices_of_a_fused_projection(attention_plan, name, rng):
    """q, k and v as views into one fused tensor, the gradient arriving transposed: strides are honoured."""
    lengths, pad = LAYOUTS[name]
    groups = PrefixGroups.from_lengths(lengths, pad)
    t, m, per_group, d = groups.num_tokens, 2, 3, 8
    real = t - groups.num_pad_tokens
    fused = randn(rng, t, m, per_group + 2, d).requires_grad_()
    grad = randn(rng, m * per_group, real, d).transpose(0, 1)
    assert not grad.is_contiguous()

    def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[:, :, :per_group].reshape(t, m * per_group, d), x[:, :, -2], x[:, :, -1]

    assert not split(fused)[1].is_contiguous() and not split(fused)[2].is_contiguous()
    out = prefix_grouped_attention(*split(fused), groups, attention_plan=attention_plan)[:real]
    (found,) = torch.autograd.grad(out, fused, grad)
    plain = plain_attention(*split(fused), lengths)
    (expected,) = torch.autograd.grad(plain, fused, grad)
    assert error(out, plain) <= BOUND and error(found, expected) <= BOUND


def test_an_expanded_gradient(attention_plan, rng):
    """`out.sum().backward()` hands over a gradient of stride 0."""
    lengths, _ = LAYOUTS["several groups"]
    groups = PrefixGroups.from_lengths(lengths)
    inputs, _ = draw(rng, groups, 4, 2)
    one = torch.ones((), dtype=torch.float64).expand(groups.num_tokens, 4, 16)
    found = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, attention_plan=attention_plan), inputs, one
    )
    plain = outputs_and_grads(lambda q, k, v: plain_attention(q, k, v, lengths), inputs, one)
    assert_close(found, plain)


@pytest.mark.parametrize("poison", ["other values", "nan"])
def test_siblings_are_isolated_bitwise(attention_plan, poison, rng):
    """What one response holds changes no bit of its prefix's and its siblings' outputs, nor of the siblings' gradients."""
    lengths = [(19, [7, 5, 7]), (6, [4, 4])]
    groups = PrefixGroups.from_lengths(lengths, pad_to_multiple=16)
    inputs, _ = draw(rng, groups, 8, 2)
    grad = randn(rng, groups.num_tokens, 8, 16)

    def run() -> list[Tensor]:
        return outputs_and_grads(
            lambda q, k, v: prefix_grouped_attention(q, k, v, groups, attention_plan=attention_plan), inputs, grad
        )

    before = run()
    changed = list(spans(lengths)[0][1][1])
    for x in (*inputs, grad):
        x[changed] = float("nan") if poison == "nan" else randn(rng, len(changed), *x.shape[1:])
    after = run()
    own_prefix = list(spans(lengths)[0][0])
    others = [row for row in range(groups.num_tokens) if row not in changed]
    siblings = [row for row in others if row not in own_prefix]
    assert torch.equal(before[0][others], after[0][others])
    for a, b in zip(before[1:], after[1:], strict=True):
        assert torch.equal(a[siblings], b[siblings])
    assert not torch.equal(before[0][changed], after[0][changed])
    assert not torch.equal(before[2][own_prefix], after[2][own_prefix])  # the prefix does learn from every response
