"""The soft penalty for long responses."""

from __future__ import annotations

import torch

from megatron_ext.losses.overlong import overlong_penalty


def test_the_penalty_by_hand():
    """20 tokens at most, of which the last 8 cost."""
    lengths = torch.tensor([0, 12, 13, 16, 20], dtype=torch.float64)
    assert overlong_penalty(lengths, 20, 8).tolist() == [0, 0, -0.125, -0.5, -1]
    assert overlong_penalty(lengths, 20, 20).tolist() == [0, -0.6, -0.65, -0.8, -1]


def test_without_a_buffer_nothing_costs():
    assert overlong_penalty(torch.tensor([0.0, 20.0]), 20, 0).tolist() == [0, 0]
