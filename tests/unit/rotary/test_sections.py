"""How many pairs each axis turns: transformers' own modules at any head size, and the published sections as the default."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.models import GPTModelConfig
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import SCHEMES, PositionIdRotaryEmbedding

# transformers' model, its classes' beginnings, our scheme, and whether it may leave a part of the head as it is.
PEERS = {
    "qwen2_vl": ("Qwen2VLTextConfig", "Qwen2VLRotaryEmbedding", "mrope", False),
    "glm4v_moe": ("Glm4vMoeTextConfig", "Glm4vMoeTextRotaryEmbedding", "mrope", True),
    "qwen3_vl": ("Qwen3VLTextConfig", "Qwen3VLTextRotaryEmbedding", "mrope_interleaved", False),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5TextRotaryEmbedding", "mrope_interleaved", True),
}


def theirs(peer: str, head: int, base: float, percent: float, sections: list[int] | None) -> torch.nn.Module:
    """transformers' module; without sections with those of its class."""
    config, module, _, partial = PEERS[peer]
    rope = {"rope_type": "default", "rope_theta": base}
    rope |= {"partial_rotary_factor": percent} if partial else {}
    rope |= {"mrope_section": sections} if sections else {}
    package = f"transformers.models.{peer}"
    make = getattr(importlib.import_module(f"{package}.configuration_{peer}"), config)
    made = make(hidden_size=4 * head, num_attention_heads=4, head_dim=head, rope_parameters=rope)
    return getattr(importlib.import_module(f"{package}.modeling_{peer}"), module)(made)


def check_equal(peer: str, head: int, base: float, percent: float, sections: list[int] | None) -> None:
    """On ids of a sequence whose axes have nothing to do with each other."""
    scheme = PEERS[peer][2]
    rng = torch.Generator().manual_seed(head + int(base))
    ids = torch.randint(5000, (3, 2, 7), generator=rng)
    expected = theirs(peer, head, base, percent, sections)(torch.zeros(1), ids)  # cos and sin [b, s, rotated]
    ours = PositionIdRotaryEmbedding(head, base, percent, "cpu", scheme, sections=sections)
    angle = ours(ids).squeeze(2).transpose(0, 1)
    for found, their in zip((angle.cos(), angle.sin()), expected, strict=True):
        assert found.shape == their.shape and (found - their).abs().max() <= 1e-6


@pytest.mark.parametrize("peer", PEERS)
@given(data=st.data())
def test_any_sections_are_those_of_transformers(peer, data):
    """At any head size and share, also where a section is too long for its turns."""
    percent = data.draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])) if PEERS[peer][3] else 1.0
    head = data.draw(st.integers(8, 128).map(lambda half: 2 * half))
    pairs = len(range(0, int(head * percent), 2))
    first, second = sorted(data.draw(st.tuples(st.integers(0, pairs), st.integers(0, pairs))))
    check_equal(peer, head, data.draw(st.sampled_from([1e4, 1e6])), percent, [first, second - first, pairs - second])


@pytest.mark.parametrize(
    ("peer", "head", "percent", "sections"),
    [
        ("qwen2_vl", 128, 1.0, [16, 24, 24]),  # Qwen2-VL, Qwen2.5-VL and Omni, PaddleOCR-VL
        ("glm4v_moe", 128, 0.5, [8, 12, 12]),  # GLM-4.1V, 4.5V
        ("qwen3_vl", 128, 1.0, [24, 20, 20]),  # Qwen3-VL and Omni
        ("qwen3_5", 256, 0.25, [11, 11, 10]),  # Qwen3.5
    ],
)
def test_without_sections_published_sizes_have_the_published_ones(peer, head, percent, sections):
    pairs = int(head * percent) // 2
    assert sum(sections) == pairs
    axes = SCHEMES[PEERS[peer][2]].axes_of_pairs(pairs)
    assert [axes.count(axis) for axis in range(3)] == sections
    check_equal(peer, head, 1e6, percent, None)


def model(**position) -> GPTModelConfig:
    return GPTModelConfig(
        2, 64, 4, 128, kv_channels=64, vocab_size=99, position_embedding=PositionEmbedding(**position)
    )


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (
            {"scheme": "mrope", "sections": [16, 24, 24]},
            r"'mrope' needs sections of 3 numbers of at least 0 that add up to the 32 pairs that are rotated, got \[16, 24",
        ),
        ({"scheme": "mrope_interleaved", "sections": [16, 16]}, r"needs sections of 3 numbers .* got \[16, 16\]"),
        ({"scheme": "mrope", "sections": [34, -1, -1]}, "numbers of at least 0"),
        ({"scheme": "mrope", "sections": [11, 11, 10], "percent": 0.5}, "add up to the 16 pairs"),
        (
            {"scheme": "vrope", "sections": [8, 8, 8, 8]},
            "'vrope' divides its pairs by itself and takes no sections, .* choose one of mrope, mrope_interleaved",
        ),
        ({"sections": [32]}, "'rope' divides its pairs by itself"),
        ({"percent": 0.01}, "percent=0.01 of 64 channels of a head leaves no pair to rotate"),
    ],
)
def test_sections_that_do_not_fit_are_refused_with_the_configuration(position, words):
    with pytest.raises(ValueError, match=f"^model.position_embedding.*{words}"):
        model(**position)


def test_sections_reach_the_model(world):
    from megatron_ext.models import build_gpt

    built = build_gpt(model(scheme="mrope_interleaved", sections=[2, 15, 15]), world)
    axes = built.rotary_pos_emb.axis.tolist()
    assert [axes.count(axis) for axis in range(3)] == [11, 11, 10]  # as many turns as there are
    built = build_gpt(model(scheme="mrope", sections=[2, 15, 15]), world)
    assert built.rotary_pos_emb.axis.tolist() == [0] * 2 + [1] * 15 + [2] * 15
