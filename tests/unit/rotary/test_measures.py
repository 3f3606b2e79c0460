"""Spatial bias of the schemes, against their published and worked-out numbers, with controls that must fail the gate."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.rotary import SCHEMES, Scheme, Text, Video, layout
from megatron_ext.rotary.measures import attention_map, measure

VIDEO = Video(16, 24, 24)
GATE = {1e4: 10.0, 1e6: 8.0}  # how many times VRoPE's asymmetry that of RoPE-3D must be
# largest / smallest, variation, asymmetry, tilt of 16 frames of 24 x 24, head dimension 128.
EXPECTED = {
    ("rope", 1e4): (30.6, 1.035, 0.476, 0.0766),
    ("rope", 1e6): (5.13, 0.392, 0.230, 0.0371),
    ("mrope", 1e4): (2.446, 0.281, 0.232, 0.0386),
    ("mrope", 1e6): (1.455, 0.112, 0.098, 0.0164),
    ("mrope_interleaved", 1e4): (1.924, 0.131, 0.102, 0.0176),
    ("mrope_interleaved", 1e6): (1.590, 0.094, 0.074, 0.0130),
    ("videorope", 1e4): (3.344, 0.249, 0.183, 0.0325),
    ("videorope", 1e6): (2.011, 0.146, 0.114, 0.0203),
    ("vrope", 1e4): (1.175, 0.031, 0.015, 0.0015),
    ("vrope", 1e6): (1.082, 0.017, 0.010, 0.0013),
}
VROPE = SCHEMES["vrope"]
CONTROLS = [
    Scheme("contiguous blocks", 4, VROPE.media, lambda pairs: [i * 4 // pairs for i in range(pairs)]),
    Scheme("two lines", 4, VROPE.media, lambda pairs: [i % 2 for i in range(pairs)]),
]


@pytest.mark.parametrize(("name", "base"), EXPECTED)
def test_the_known_numbers(name, base):
    found, expected = measure(VIDEO, name, 128, base), EXPECTED[name, base]
    values = (found.largest_over_smallest, found.variation, found.asymmetry, found.tilt)
    for value, known in zip(values, expected, strict=True):
        assert value == pytest.approx(known, rel=2e-3, abs=1e-3 if known < 2 else 0)
    assert float(found.map.mean()) == pytest.approx(1)


@pytest.mark.parametrize("base", GATE)
def test_vrope_is_the_least_asymmetric_and_its_controls_are_not(base):
    threshold = measure(VIDEO, "mrope", 128, base).asymmetry / GATE[base]
    assert measure(VIDEO, "vrope", 128, base).asymmetry <= threshold
    for control in CONTROLS:
        assert measure(VIDEO, control, 128, base).asymmetry > threshold, control.name


def test_what_speaks_against_it():
    """Published beside the rest: over time VRoPE is steep where RoPE-3D is flat."""
    assert measure(VIDEO, "vrope", 128, 1e4).temporal_steepness == pytest.approx(29.9, rel=0.01)
    assert measure(VIDEO, "mrope", 128, 1e4).temporal_steepness == pytest.approx(1.1, abs=0.05)


@pytest.mark.parametrize(("frames", "gap"), [(16, 11.6), (256, 183.6), (1216, 903.6)])
def test_the_step_from_video_to_text(frames, gap):
    """VRoPE: 24 whatever the video's length, for every token; RoPE-3D: the longer the video, the farther."""
    assert measure(Video(frames, 24, 24), "mrope", queries=1).text_gap == pytest.approx(gap, abs=0.05)
    assert measure(Video(frames, 24, 24), "vrope", queries=1).text_gap == pytest.approx(24.0)


def test_the_map_is_the_plain_sum_of_cosines(rng):
    """The matrix product behind it, against the kernel written out pair by pair."""
    video, pairs, base, queries = Video(2, 3, 2), 8, 50.0, 3
    for scheme in SCHEMES.values():
        ids = layout([video, Text(queries)], scheme).ids.double()
        axis = scheme.allocation(pairs)
        logits = torch.zeros(queries, 12, dtype=torch.float64)
        for q in range(queries):
            for k in range(12):
                steps = [0 * ids[0, q] if a is None else ids[a, 12 + q] - ids[a, k] for a in axis]
                angles = [step * base ** (-i / pairs) for i, step in enumerate(steps)]
                logits[q, k] = sum(a.cos() for a in angles) / pairs * (2 * pairs) ** 0.5
        expected = logits.softmax(1).mean(0).view(2, 3, 2)
        assert (attention_map(video, scheme, 2 * pairs, base, queries) - expected).abs().max() <= 1e-12
