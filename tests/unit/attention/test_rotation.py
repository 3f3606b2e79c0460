"""Rotation at core attention: Megatron's own, with gradients, from tables that are made once."""

from __future__ import annotations

import random

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as by_megatron

from megatron_ext.attention.rotation import RotaryTables
from megatron_ext.rotary import PositionIdRotaryEmbedding
from tests.layouts import randn


def drawn(rng, interleaved: bool, dtype: torch.dtype):
    """(embedding, x [s, n, d] with a gradient, a view as Megatron's projection gives it)."""
    draw = random.Random()
    rows, heads, pairs, rest = draw.randint(1, 40), draw.randint(1, 5), draw.randint(1, 9), draw.choice([0, 0, 3])
    width = 2 * pairs + rest
    module = PositionIdRotaryEmbedding(width, 10_000.0, 2 * pairs / width, "cpu", interleaved=interleaved)
    embedding = module(torch.randint(0, 4000, (1, 1, rows)))
    whole = randn(rng, rows, heads, width + 4).to(dtype).requires_grad_()
    return embedding, whole, whole[..., 2 : width + 2]


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_megatrons_rotation_with_its_gradient(interleaved, rng):
    embedding, whole, x = drawn(rng, interleaved, torch.float64)
    embedding = embedding.double()
    out = RotaryTables.of(embedding, torch.float64, interleaved).rotate(x)
    expected = by_megatron(
        x.unsqueeze(1), embedding, rotary_interleaved=interleaved, multi_latent_attention=False, mscale=1.0
    ).squeeze(1)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    gradient = randn(rng, *out.shape)
    ours, theirs = (torch.autograd.grad(o, whole, gradient)[0] for o in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_an_attention_factor_makes_everything_rotated_so_much_longer(rng):
    embedding, whole, x = drawn(rng, False, torch.float64)
    plain, scaled = (RotaryTables.of(embedding.double(), torch.float64, scaling=f) for f in (1.0, 1.7))
    width = 2 * plain.cos.size(-1)
    gradient = randn(rng, *x.shape)
    (out, expected), (ours, theirs) = zip(
        *((t.rotate(x), torch.autograd.grad(t.rotate(x), x, gradient)[0]) for t in (scaled, plain)), strict=True
    )
    for found, one in ((out, expected), (ours, theirs)):
        torch.testing.assert_close(found[..., :width], 1.7 * one[..., :width], rtol=1e-13, atol=1e-13)
        assert torch.equal(found[..., width:], one[..., width:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rounds_twice(dtype, rng):
    """Against fp64 by the same tables: a product, then the sum with the other, half a unit in the last place each."""
    embedding, _, x = drawn(rng, False, dtype)
    tables = RotaryTables.of(embedding, dtype)
    exact = RotaryTables(tables.cos.double(), tables.sin.double()).rotate(x.double())
    pairs, cos, sin = tables.cos.size(-1), tables.cos.double().abs(), tables.sin.double().abs()
    a, b, rest = x.detach().double().abs().split([pairs, pairs, x.size(-1) - 2 * pairs], dim=-1)
    bound = torch.cat([a * cos + b * sin, b * cos + a * sin, rest], dim=-1)
    assert ((tables.rotate(x).double() - exact).abs() <= 1.01 * torch.finfo(dtype).eps * bound).all()


def test_it_keeps_the_tables_alone(rng):
    embedding, _, x = drawn(rng, False, torch.float32)
    tables = RotaryTables.of(embedding, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tables.rotate(x)
    assert {t.data_ptr() for t in kept} == {tables.cos.data_ptr(), tables.sin.data_ptr()}
