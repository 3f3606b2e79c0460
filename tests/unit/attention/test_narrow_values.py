"""Values of fewer channels than keys, in every kernel and form of plan, with all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.attention import Scoring, prefix_grouped_attention
from megatron_ext.attention.kernels import KERNELS
from megatron_ext.grouping import PrefixGroups
from tests.layouts import plain_tree_attention, randn
from tests.strategies import nested_strategy
from tests.unit.attention.comparison import assert_close, draw, outputs_and_grads


@settings(max_examples=25, deadline=None)
@given(
    nested_strategy,
    st.sampled_from(["cpu", "blockwise", "reference"]),
    st.sampled_from(["levels", "one_call"]),
    st.sampled_from([1, 5, 16]),
    st.integers(0, 2**31),
)
def test_equals_repeated_sequences(forest, kernel, plan, width, seed):
    groups, rng = PrefixGroups.from_lengths(forest, 16), torch.Generator().manual_seed(seed)
    inputs, grad = draw(rng, groups, 4, 2)
    inputs[2], grad = inputs[2][..., :width], grad[..., :width]
    scoring = Scoring(16**-0.5)
    found = outputs_and_grads(
        lambda q, k, v: prefix_grouped_attention(q, k, v, groups, scoring, kernel, plan), inputs, grad
    )
    assert_close(found, outputs_and_grads(lambda q, k, v: plain_tree_attention(q, k, v, forest), inputs, grad))


def test_who_pads_says_so():
    def takers(key: int, value: int) -> set[str]:
        return {name for name, kernel in KERNELS.items() if kernel.takes_values(key, value)}

    assert takers(64, 64) == set(KERNELS) and takers(192, 128) == {"blockwise", "flash_attn_3"}
    assert takers(64, 32) == takers(192, 64) == {"blockwise"}


def test_refuses_values_wider_than_keys(rng):
    groups = PrefixGroups.from_lengths([(3, [2])])
    with pytest.raises(ValueError, match=r"key, value \[t, m, d or less\]"):
        prefix_grouped_attention(randn(rng, 5, 2, 8), randn(rng, 5, 2, 8), randn(rng, 5, 2, 9), groups)
