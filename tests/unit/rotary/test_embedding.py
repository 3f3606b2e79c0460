"""Rotary positions from ids: Megatron's own numbers for a document, and any order of positions."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_ext.grouping import PrefixGroups
from megatron_ext.rotary import PositionIdRotaryEmbedding


@pytest.mark.parametrize("percent", [1.0, 0.5])
@pytest.mark.parametrize("base", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("dim", [8, 64, 128])
def test_equals_megatrons_for_one_document_bitwise(dim, base, percent, world):
    length = 300
    megatron = RotaryEmbedding(dim, rotary_percent=percent, rotary_base=base, use_cpu_initialization=True)
    ours = PositionIdRotaryEmbedding(dim, base, percent, "cpu")
    found, expected = ours(torch.arange(length).view(1, 1, -1)), megatron(length)
    assert found.dtype == torch.float32 and found.shape == (length, 1, 1, int(dim * percent))
    assert torch.equal(found, expected)


def test_every_row_gets_the_angle_of_its_position(world):
    """In a grouped stream all responses of a prompt continue it: rows of equal position are equal, bitwise."""
    groups = PrefixGroups.from_lengths([(5, [3, 2]), (2, [4])], pad_to_multiple=16)
    rotary = PositionIdRotaryEmbedding(16, 10_000.0, 1.0, "cpu")
    found = rotary(groups.position_ids.view(1, 1, -1))
    document = rotary(torch.arange(16).view(1, 1, -1))
    assert torch.equal(found, document[groups.position_ids])
    first_rows = [s.start for s in groups.segments if s.group == 0 and not s.is_prefix]
    assert len(first_rows) == 2 and torch.equal(found[first_rows], document[[5, 5]])


def test_survives_half_precision_and_stays_out_of_checkpoints(world):
    """model.bfloat16() must not round the frequencies, and nothing rotary enters the state dict."""
    rotary = PositionIdRotaryEmbedding(16, 10_000.0, 1.0, "cpu")
    positions = torch.arange(1000, 2000).view(1, 1, -1)
    before = rotary(positions)
    assert torch.equal(before, rotary.bfloat16()(positions))
    assert not rotary.state_dict()
