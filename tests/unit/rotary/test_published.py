"""Published schemes: figures of their authors' code, transformers' own positions, and what each paper promises."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.rotary import Image, PositionIdRotaryEmbedding, Text, Video, find_scheme, layout
from tests.published_positions import by_transformers

# What published code placed where, each with its repository and commit: merged grids [t, h, w] between lengths of text, ids
# [axes, tokens] (of `rows`, where there are too many), and where the text after them goes on.
FIGURES = json.loads((Path(__file__).parents[2] / "fixtures" / "position_schemes.json").read_text())
figures = pytest.mark.parametrize("figure", FIGURES, ids=[f"{f['scheme']} {f['source'][11:25]}" for f in FIGURES])


@figures
def test_positions_are_those_of_published_code(figure):
    """Theirs are of fp32, ours of fp64."""
    for case in figure["layouts"]:
        items = [Text(part) if isinstance(part, int) else Video(*part) for part in case["parts"]]
        table = layout(items, figure["scheme"])
        ids = table.ids.double()
        expected = torch.tensor(case["ids"], dtype=torch.float64)
        found = ids[:, case["rows"]] if "rows" in case else ids
        assert (found - expected).abs().max() <= 2e-6 * max(1.0, expected.abs().max()), case["parts"]
        assert table.next_index == pytest.approx(case["next"], abs=1e-5)


@pytest.mark.parametrize("figure", [f for f in FIGURES if "sin_of" in f], ids=lambda f: f["scheme"])
def test_pairs_are_turned_as_in_published_code(figure):
    """Head dimension 32, base 10^4, of ids whose axes have nothing to do with each other."""
    ids = torch.tensor(figure["sin_of"]["ids"])  # [3, s]
    ours = PositionIdRotaryEmbedding(32, 1e4, 1.0, "cpu", figure["scheme"])
    found = ours(ids[: ours.scheme.axes].unsqueeze(1))[:, 0, 0, :16].sin()
    assert (found - torch.tensor(figure["sin_of"]["sin"])).abs().max() <= 1e-6


# transformers' package, its model, our scheme, whether a video stands there as frames with text between.
FAMILIES = {
    "qwen2_vl": ("qwen2_vl", "Qwen2VLModel", "qwen2_vl", False),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLModel", "qwen2_5_vl", False),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLModel", "qwen3_vl", True),
    "qwen3_5": ("qwen3_5", "Qwen3_5Model", "qwen3_vl", True),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe", "Ernie4_5_VLMoeModel", "ernie4_5_vl", False),
}


def drawn(rng: random.Random, frames_apart: bool) -> list[tuple[Text | Video, int]]:
    """Texts, images (1) and videos (2), with text between media."""
    found: list[tuple[Text | Video, int]] = [(Text(rng.randint(0, 5)), 0)]
    for _ in range(rng.randint(1, 4)):
        kind, h, w = rng.choice((1, 2)), rng.randint(1, 6), rng.randint(1, 6)
        frames = rng.randint(1, 6) if kind == 2 else 1
        if frames_apart:
            found += [part for _ in range(frames) for part in ((Video(1, h, w), kind), (Text(rng.randint(1, 4)), 0))]
        else:
            step = rng.choice((0.5, 1.0, 0.7, 2 / 3, 1.37, 2.5))
            seconds = tuple(i * step for i in range(frames)) if kind == 2 else None
            found += [(Video(frames, h, w, seconds), kind), (Text(rng.randint(1, 5)), 0)]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_transformers(family):
    """200 layouts of texts, images and videos, drawn afresh."""
    package, name, scheme, frames_apart = FAMILIES[family]
    rng = random.Random()
    for _ in range(200):
        parts = drawn(rng, frames_apart)
        expected = by_transformers(package, name, parts, frames_apart)
        assert torch.equal(layout([item for item, _ in parts], scheme).ids, expected), parts


def test_ernies_pairs_are_those_of_transformers():
    from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig
    from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeTextRotaryEmbedding

    for head, sections in ((128, [22, 22, 20]), (32, [5, 5, 6]), (64, [15, 15, 2])):
        rope = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": sections}
        config = Ernie4_5_VLMoeTextConfig(
            hidden_size=4 * head, num_attention_heads=4, head_dim=head, rope_parameters=rope
        )
        ids = torch.randint(5000, (3, 2, 7))
        cos, sin = Ernie4_5_VLMoeTextRotaryEmbedding(config)(torch.zeros(1), ids)
        given = None if head == 128 else sections
        angle = PositionIdRotaryEmbedding(head, 5e5, 1.0, "cpu", "ernie4_5_vl", interleaved=True, sections=given)(ids)
        angle = angle.squeeze(2).transpose(0, 1)
        assert (angle.cos() - cos).abs().max() <= 1e-6 and (angle.sin() - sin).abs().max() <= 1e-6


def test_frames_that_are_not_equally_far_apart_stand_at_their_seconds():
    table = layout([Text(2), Video(4, 1, 2, seconds=(3.0, 3.4, 5.0, 9.75)), Text(1)], "qwen2_5_vl(tokens_per_second=4)")
    assert table.ids[0].tolist() == [0, 1, 2, 2, 3, 3, 10, 10, 29, 29, 4]
    assert table.next_index == 5


grid = (st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
media = st.builds(Video, *grid, st.none(), st.integers(1, 3))


@given(media, st.integers(0, 50))
def test_views_have_the_eight_lines_of_a_cube(video, start):
    """Token by token: s + t L + the distance from each of eight corners, L = V + H + W - 2; all of a frame are as near."""
    sizes = (video.views, video.h, video.w)
    stride = sum(sizes) - 2
    expected = [
        [
            start + t * stride + sum(line)
            for line in itertools.product(*((p, n - 1 - p) for p, n in zip(place, sizes, strict=True)))
        ]
        for t in range(video.t)
        for place in itertools.product(*map(range, sizes))
    ]
    table = layout([video], "vrope_views", start)
    assert table.ids.t().tolist() == expected and table.next_index == start + video.t * stride
    means = table.ids.double().mean(0).view(video.t, -1)
    assert bool((means == means[:, :1]).all())


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_one_view_is_vrope_bitwise(t, h, w):
    ids = [layout([Text(3), Video(t, h, w), Text(2)], name).ids.unsqueeze(1) for name in ("vrope", "vrope_views")]
    plain, views = (
        PositionIdRotaryEmbedding(32, 1e4, 1.0, "cpu", name)(x)
        for name, x in zip(("vrope", "vrope_views"), ids, strict=True)
    )
    assert torch.equal(plain, views)


@pytest.mark.parametrize("name", ["vrope", "vrope_views"])
@given(
    st.lists(
        st.one_of(media, st.builds(Text, st.integers(1, 4)), st.builds(Image, st.integers(1, 4), st.integers(1, 4)))
    )
)
def test_several_videos_and_images_inside_text_follow_each_other(name, items):
    """Every frame and text begins one behind the largest id of what stood before it: nothing overlaps, nothing is skipped."""
    table, row, index = layout(items, name), 0, 0
    for item in items:
        parts = item.t if isinstance(item, Video) else 1
        for _ in range(parts):
            ids = table.ids[:, row : row + item.length // parts]
            assert ids.min() == index
            index, row = int(ids.max()) + 1, row + ids.size(1)
    assert table.next_index == index


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 30))
def test_a_circles_tokens_are_equally_far_from_every_text(h, w, start):
    """That is what it is for: the distance in (t, h, w) is the same for all of a frame's tokens."""
    table = layout([Text(start), Image(h, w), Text(5)], "circle_rope(radius=3)")
    frame, after = table.ids[:, start : start + h * w], table.ids[:, start + h * w :]
    distances = torch.cdist(frame.t(), torch.cat((table.ids[:, :start], after), 1).t())  # [h w, texts]
    assert (distances - distances[:1]).abs().max() <= 1e-9
    assert (torch.linalg.norm(frame - start, dim=0) - 3).abs().max() <= 1e-9


@given(st.builds(Video, *grid), st.sampled_from([1, 5, 16, 64]))
def test_a_frame_of_v2pe_takes_its_stride(video, stride):
    table = layout([Text(4), video, Text(1)], f"v2pe(stride={stride})")
    last = table.ids[0, 4:-1].view(video.t, -1)[:, -1]
    assert last.tolist() == pytest.approx([3 + stride * (t + 1) for t in range(video.t)])
    assert table.ids[0, -1] == 4 + stride * video.t


def test_pairs_that_nothing_turns_stay_as_they_are():
    """A quarter of HoPE's pairs, those of the lowest frequencies, also in text; the others of a text are plain RoPE's."""
    ids = torch.arange(1, 9, dtype=torch.float64).view(1, 1, -1)
    hope = PositionIdRotaryEmbedding(32, 1e4, 1.0, "cpu", "hope")(ids)[:, 0, 0, :16]
    plain = PositionIdRotaryEmbedding(32, 1e4, 1.0, "cpu")(ids)[:, 0, 0, :16]
    assert torch.equal(hope[:, :12], plain[:, :12]) and not torch.count_nonzero(hope[:, 12:])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: find_scheme("v2pe(strid=64)"),
            r"'v2pe\(strid=64\)': v2pe has stride=64.0, and nothing called 'strid'",
        ),
        (lambda: find_scheme("v2pe(64)"), "v2pe has stride=64.0, and nothing called '64'"),
        (lambda: find_scheme("hope(stride=fast)"), "stride must be a number, got 'fast'"),
        (lambda: find_scheme("hope(stride=-1)"), r"'hope': stride=-1.0 must be above 0"),
        (lambda: find_scheme("circle_rope(alpha=2)"), r"alpha=2.0 must lie in 0 .. 1"),
        (lambda: find_scheme("vrope(stride=2)"), "vrope has no numbers, and nothing called 'stride'"),
        (lambda: find_scheme("nothing(stride=2)"), "unknown position scheme 'nothing'"),
        (lambda: Video(2, 1, 1, seconds=(0.0,)), "seconds are one finite number for each of the 2 frames, ascending"),
        (lambda: Video(2, 1, 1, seconds=(1.0, 0.0)), "ascending"),
        (lambda: Video(1, 1, 1, seconds=(float("nan"),)), "finite"),
        (lambda: Video(1, 1, 1, views=0), "one view"),
        (lambda: find_scheme("ernie4_5_vl").axes_of_pairs(16, [4, 6, 6]), "as many pairs of rows as of columns"),
    ],
)
def test_refuses_numbers_and_media_that_cannot_be(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_scheme_with_numbers_keeps_its_name():
    """It is what a checkpoint says of it."""
    assert find_scheme("hope(stride=0.75)").name == "hope(stride=0.75)"
    assert find_scheme("hope()").media is find_scheme("hope").media
