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
    axes = SCHEMES[name].allocation(turned // 2)
    axis = torch.tensor([a or 0 for a in axes])
    frequency = 1.0 / base ** (torch.arange(0, turned, 2).float() / turned)
    frequency = frequency * torch.tensor([a is not None for a in axes])
    angle = (ids.float()[axis].t() * frequency).double()  # fp32, then exact: its rounding is part of the definition
    wide = x.double()[..., :turned]
    halves = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    z = torch.complex(*halves) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    expected = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    assert (found[..., :turned].double() - expected).abs().max() <= 1e-6 * x.abs().max()
    assert torch.equal(found[..., turned:], x[..., turned:])


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_cos_and_sin_are_those_of_the_exact_angle(name):
    """Small angles, where fp32 holds them to 1e-7, and V2PE's, which are up to 64."""
    ids = layout([Video(1, 3, 3)], name).ids
    bound = 1e-6 * max(1.0, float(ids.abs().max()) / 8)
    rotary = PositionIdRotaryEmbedding(64, 1e6, 1.0, "cpu", name)
    axes = SCHEMES[name].allocation(32)
    angle = ids.float().double()[[a or 0 for a in axes]].t() * torch.tensor([a is not None for a in axes])
    angle = angle * 1e6 ** (-torch.arange(32, dtype=torch.float64) / 32)
    found = rotary(ids.unsqueeze(1)).squeeze((1, 2)).double()
    expected = torch.cat((angle, angle), -1)
    assert (found.cos() - expected.cos()).abs().max() <= bound and (found.sin() - expected.sin()).abs().max() <= bound


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


@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - {"hope"}))
def test_text_is_plain_rope_bitwise(name):
    ids = layout([Text(50)], name).ids.unsqueeze(1)
    plain = PositionIdRotaryEmbedding(32, 1e4, 1.0, "cpu")(torch.arange(50).view(1, 1, -1))
    assert torch.equal(PositionIdRotaryEmbedding(32, 1e4, 1.0, "cpu", name)(ids), plain)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "factor": 8.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
# As published: Llama 3.1, Qwen2.5, DeepSeek-V3, gpt-oss (head size 64); and what each key does.
SCALINGS = {
    "llama3": LLAMA3,
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "yarn": YARN,
    "yarn, of DeepSeek": YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
    "yarn, two mscales": YARN | {"mscale": 0.707, "mscale_all_dim": 1.3, "original_max_position_embeddings": 4096},
    "yarn, of gpt-oss": YARN | {"factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096},
    "yarn, attention factor": YARN | {"attention_factor": 0.83, "beta_fast": 24, "beta_slow": 2.5},
    "longrope": {"factor": 32.0, "original_max_position_embeddings": 4096, "short_factor": 1, "long_factor": 3},
    "longrope, attention factor": {
        "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.19, "short_factor": 1, "long_factor": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(name, rng):
    """At every length that the type has one set of frequencies for."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, keys, pairs = name.partition(",")[0], dict(SCALINGS[name]), 64
    for key in keys.keys() & {"short_factor", "long_factor"}:
        keys[key] = (keys[key] + torch.rand(pairs, generator=rng)).tolist()
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5} | keys,
    )  # fmt: skip
    ours_keys = keys | ({"original_max_position_embeddings": 131072} if kind == "dynamic" else {})
    scaling = RopeScaling(rope_type=kind, **ours_keys)
    ours = PositionIdRotaryEmbedding(128, 5e5, 1.0, "cpu", scaling=scaling)
    assert ours.inv_freq.dtype == torch.float32
    longest = scaling.longest or 131072
    assert (scaling.longest is None) == (kind not in ("dynamic", "longrope"))
    for length in (None, 1, 17, longest - 1, longest):
        theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        assert (ours.inv_freq / theirs - 1).abs().max() <= 1e-6
        assert ours.attention_scaling == pytest.approx(factor, rel=1e-12)
    plain = PositionIdRotaryEmbedding(128, 5e5, 1.0, "cpu").inv_freq
    assert torch.equal(ours.inv_freq, plain) == (kind == "dynamic")  # it does something
    if kind in ("dynamic", "longrope"):  # one token more, and transformers turns otherwise
        beyond, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=longest + 1)
        assert (ours.inv_freq / beyond - 1).abs().max() > 1e-6


def test_llama_3_scaling_equals_megatron(world):
    ours = PositionIdRotaryEmbedding(128, 5e5, 1.0, "cpu", scaling=RopeScaling()).inv_freq
    megatron = RotaryEmbedding(128, 1.0, rotary_base=500_000, rope_scaling=True, use_cpu_initialization=True).inv_freq
    assert (ours / megatron - 1).abs().max() <= 1e-6
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
    for fields, words in (
        ({"rope_type": "ntk"}, "rope_type='ntk' must be one of llama3, linear, dynamic, yarn, longrope"),
        ({"rope_type": "linear", "beta_fast": 20.0}, "beta_fast=20.0 is no key of rope_type=linear; leave it out"),
        ({"beta_fast": 20.0}, "beta_fast=20.0 is no key of rope_type=llama3"),
        ({"rope_type": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}, "expected 0 < beta_slow <= beta_fast"),
        ({"rope_type": "yarn", "attention_factor": 0.0}, "expected attention_factor > 0"),
        ({"rope_type": "longrope", "short_factor": [1, 2]}, "needs a short_factor and a long_factor above 0 for each"),
        (
            {"rope_type": "longrope", "short_factor": [1], "long_factor": [2], "original_max_position_embeddings": 1},
            "expected original_max_position_embeddings > 1",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            RopeScaling(**fields)
