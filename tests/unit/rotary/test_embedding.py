"""Rotary positions from ids: Megatron's own numbers for a document, and any order of positions."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding

from megatron_ext.grouping import PrefixGroups
from megatron_ext.rotary import SCHEMES, Image, PositionIdRotaryEmbedding, RopeScaling, Scheme, Text, Video, layout
from tests.layouts import randn


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


MEDIA = [Text(3), Video(3, 4, 5), Text(2), Image(2, 7), Text(4)]


def rotate(x: torch.Tensor, embedding: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """As Megatron does it: x [s, b, n, d]."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    return _apply_rotary_pos_emb_bshd(x, embedding, rotary_interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [1.0, 0.5])
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_rotation_equals_multiplying_complex_numbers(name, percent, interleaved, rng):
    """Every pair is one complex number, turned by the angle of its axis."""
    dim, base = 32, 100.0
    turned = int(dim * percent)
    ids = layout(MEDIA, name).ids
    rotary = PositionIdRotaryEmbedding(dim, base, percent, "cpu", name, interleaved)
    x = randn(rng, ids.size(1), 1, 3, dim).float()
    found = rotate(x, rotary(ids.unsqueeze(1)), interleaved)
    axis = torch.tensor(SCHEMES[name].allocation(turned // 2))
    frequency = 1.0 / base ** (torch.arange(0, turned, 2).float() / turned)
    angle = (ids.float()[axis].t() * frequency).double()  # fp32, then exact: its rounding is part of the definition
    wide = x.double()[..., :turned]
    halves = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    z = torch.complex(*halves) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    expected = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    assert (found[..., :turned].double() - expected).abs().max() <= 1e-6 * x.abs().max()
    assert torch.equal(found[..., turned:], x[..., turned:])


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_cos_and_sin_are_those_of_the_exact_angle(name):
    """Small angles, where fp32 holds them to 1e-7."""
    ids = layout([Video(1, 3, 3)], name).ids
    rotary = PositionIdRotaryEmbedding(64, 1e6, 1.0, "cpu", name)
    angle = ids.double()[torch.tensor(SCHEMES[name].allocation(32))].t()
    angle = angle * 1e6 ** (-torch.arange(32, dtype=torch.float64) / 32)
    found = rotary(ids.unsqueeze(1)).squeeze((1, 2)).double()
    expected = torch.cat((angle, angle), -1)
    assert (found.cos() - expected.cos()).abs().max() <= 1e-6 and (found.sin() - expected.sin()).abs().max() <= 1e-6


@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_megatrons_multimodal_embedding(interleaved, world, monkeypatch):
    """On its three axes and contiguous sections; interleaved it fails on more than one axis, so on equal ones."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    ids = layout([Text(5)] if interleaved else MEDIA, "mrope").ids.unsqueeze(1)
    ours = PositionIdRotaryEmbedding(64, 1e4, 1.0, "cpu", "mrope", interleaved)
    if interleaved:
        theirs = RotaryEmbedding(64, 1.0, rotary_interleaved=True, use_cpu_initialization=True)(5)
    else:
        theirs = MultimodalRotaryEmbedding(64, 1.0)(ids, [8, 12, 12])
    assert torch.equal(ours(ids), theirs)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_samples_beside_each_other_equal_one_by_one(name):
    """Per-sample ids [axes, b, s] give what each sample gives alone, bitwise."""
    samples = [layout([Text(n), Video(2, 3, 2), Text(9 - n)], name).ids for n in (1, 4, 7)]
    rotary = PositionIdRotaryEmbedding(32, 1e4, 1.0, "cpu", name)
    together = rotary(torch.stack(samples, 1))
    assert together.shape == (21, 3, 1, 32)
    for number, ids in enumerate(samples):
        assert torch.equal(together[:, number : number + 1], rotary(ids.unsqueeze(1)))


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_text_is_plain_rope_bitwise(name):
    ids = layout([Text(50)], name).ids.unsqueeze(1)
    plain = PositionIdRotaryEmbedding(32, 1e4, 1.0, "cpu")(torch.arange(50).view(1, 1, -1))
    assert torch.equal(PositionIdRotaryEmbedding(32, 1e4, 1.0, "cpu", name)(ids), plain)


def test_llama_3_scaling_equals_hugging_face_and_megatron(world):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = PositionIdRotaryEmbedding(128, 5e5, 1.0, "cpu", scaling=RopeScaling()).inv_freq
    megatron = RotaryEmbedding(128, 1.0, rotary_base=500_000, rope_scaling=True, use_cpu_initialization=True).inv_freq
    assert ours.dtype == torch.float32
    assert (ours / theirs - 1).abs().max() <= 1e-6 and (ours / megatron - 1).abs().max() <= 1e-6
    plain = PositionIdRotaryEmbedding(128, 5e5, 1.0, "cpu").inv_freq
    assert bool((ours < 0.2 * plain).any()) and bool((ours == plain).any())  # it does something, and not everywhere


SHORT = Scheme("short", 3, SCHEMES["mrope"].media, lambda pairs: [0] * (pairs // 2))


def test_refuses_a_scheme_whose_allocation_does_not_fit_the_head():
    with pytest.raises(ValueError, match=r"'short' allocates 8 pairs as \[0, 0, 0, 0\]; .* 8 integers in 0 .. 2"):
        PositionIdRotaryEmbedding(32, 1e4, 0.5, "cpu", f"{__name__}.SHORT")


def test_refuses_ids_of_another_scheme_and_scalings_without_meaning():
    rotary = PositionIdRotaryEmbedding(32, 1e4, 1.0, "cpu", "vrope")
    with pytest.raises(ValueError, match=r"scheme 'vrope' has 4 axes, got ids \(3, 1, 5\)"):
        rotary(torch.arange(15).view(3, 1, 5))
    with pytest.raises(ValueError, match="expected factor >= 1"):
        RopeScaling(factor=0.5)
    with pytest.raises(ValueError, match="low_freq_factor < high_freq_factor"):
        RopeScaling(low_freq_factor=4.0)
