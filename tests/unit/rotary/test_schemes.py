"""Position schemes: worked numbers, invariants, and what each promises about texts and media beside each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.rotary import SCHEMES, Image, Scheme, SharedText, Text, Video, find_scheme, layout, register_scheme

names = st.sampled_from(sorted(SCHEMES))
videos = st.builds(Video, st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
items = st.lists(st.one_of(videos, st.builds(Text, st.integers(0, 5))), max_size=5)
every_scheme = pytest.mark.parametrize("name", sorted(SCHEMES))

# The closed form of arXiv 2502.11664, by hand: two frames of 2 x 3, from index 5, one column per token.
WORKED = [
    [5, 6, 7, 6, 7, 8, 9, 10, 11, 10, 11, 12],  # from the top left corner
    [7, 6, 5, 8, 7, 6, 11, 10, 9, 12, 11, 10],  # top right
    [6, 7, 8, 5, 6, 7, 10, 11, 12, 9, 10, 11],  # bottom left
    [8, 7, 6, 7, 6, 5, 12, 11, 10, 11, 10, 9],  # bottom right
]


def test_vrope_worked_numbers():
    table = layout([Video(2, 2, 3)], "vrope", start=5)
    assert table.ids.tolist() == WORKED and table.next_index == 13
    assert table.scheme.allocation(8) == [0, 1, 2, 3, 0, 1, 2, 3]


@given(videos, st.integers(0, 100))
def test_vrope_is_its_formula(video, start):
    """Token by token: s + t L + the distance from each corner, L = H + W - 1."""
    expected = [
        [start + t * (video.h + video.w - 1) + a + b for a in (h, video.h - 1 - h) for b in (w, video.w - 1 - w)]
        for t, h, w in itertools.product(range(video.t), range(video.h), range(video.w))
    ]
    table = layout([video], "vrope", start)
    assert table.ids.t().tolist() == expected
    assert table.next_index == start + video.t * (video.h + video.w - 1)


def by_definition(name: str, video: Video, start: int) -> tuple[list[list[int]], int]:
    """The papers' words, token by token: (coordinates of each token, index of the text after them).

    VideoRoPE's middle of an even side, and where text goes on after it, are those of its authors' evaluation code.
    """
    tokens = []
    for t in range(video.t):
        for h in range(video.h):
            for w in range(video.w):
                if name == "rope":  # arXiv 2104.09864: the place in the sequence
                    tokens.append([start + len(tokens)])
                elif name == "videorope":  # arXiv 2502.05173: two indices a frame, the rest from its centre
                    middle_row, middle_column = math.ceil(video.h / 2) - 1, math.ceil(video.w / 2) - 1
                    frame = start + 2 * t
                    tokens.append([frame, frame + h - middle_row, frame + w - middle_column])
                else:  # arXiv 2409.12191: frame, row and column, each from where the text ended
                    tokens.append([start + t, start + h, start + w])
    if name == "videorope":
        return tokens, tokens[-1][0] + 1  # its last frame
    return tokens, max(max(coordinates) for coordinates in tokens) + 1


@pytest.mark.parametrize("name", ["rope", "mrope", "mrope_interleaved", "videorope"])
@given(video=videos, start=st.integers(0, 100))
def test_the_peers_are_their_definitions(name, video, start):
    expected, after = by_definition(name, video, start)
    table = layout([Text(start), video, Text(2)], name)
    assert table.ids[:, start : start + video.length].t().tolist() == expected
    assert table.ids[:, start + video.length :].t().tolist() == [[i] * SCHEMES[name].axes for i in (after, after + 1)]
    assert table.next_index == after + 2


@given(videos)
def test_vrope_invariants(video):
    """No place is favoured, mirrored frames have mirrored lines, frames and texts follow each other by one step."""
    table = layout([video], "vrope", start=7)
    grid = table.ids.view(4, video.t, video.h, video.w)
    within = grid - grid.amin((0, 2, 3), keepdim=True)
    assert bool((within.sum(0) == 2 * (video.h + video.w - 2)).all())
    assert torch.equal(grid.flip(3)[[1, 0, 3, 2]], grid) and torch.equal(grid.flip(2)[[2, 3, 0, 1]], grid)
    lows, highs = grid.amin((0, 2, 3)), grid.amax((0, 2, 3))
    assert lows[0] == 7 and torch.equal(lows[1:], highs[:-1] + 1) and table.next_index == highs[-1] + 1


@every_scheme
@given(items=items)
def test_text_is_plain_rope_everywhere(name, items):
    """Every text stands at consecutive positions on every axis, from where the item before it said."""
    table, index, row = layout(items, name), 0, 0
    for item in items:
        ids = table.ids[:, row : row + item.length]
        if isinstance(item, Text):
            assert torch.equal(ids, (index + torch.arange(item.length, dtype=ids.dtype)).expand(len(ids), -1))
            index += item.length
        else:
            alone = layout([item], name, index)
            assert torch.equal(ids, alone.ids)
            index = alone.next_index
        row += item.length
    assert table.next_index == index and table.ids.shape == (SCHEMES[name].axes, row)


@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - {"mrope_i", "v2pe", "circle_rope"}))
def test_a_single_token_of_a_medium_is_text(name):
    """A frame of 1 x 1, text after it: bit for bit plain RoPE, but where rows count from 0 or a frame has a length."""
    ids = layout([Text(3), Image(1, 1), Text(2)], name).ids
    assert torch.equal(ids, torch.arange(6, dtype=ids.dtype).expand(SCHEMES[name].axes, -1))


@pytest.mark.parametrize(
    ("name", "first", "last", "next_index"),
    [
        ("rope", [10], [10 + 35], 10 + 36),
        ("mrope", [10, 10, 10], [12, 12, 13], 14),
        ("mrope_interleaved", [10, 10, 10], [12, 12, 13], 14),
        ("videorope", [10, 9, 9], [14, 15, 16], 15),
    ],
)
def test_the_peers_worked_numbers(name, first, last, next_index):
    """Three frames of 3 x 4 from index 10."""
    table = layout([Video(3, 3, 4)], name, start=10)
    assert table.ids[:, 0].tolist() == first and table.ids[:, -1].tolist() == last
    assert table.next_index == next_index


@pytest.mark.parametrize(
    ("name", "counts"),
    [("mrope", [16, 24, 24]), ("mrope_interleaved", [24, 20, 20]), ("videorope", [16, 24, 24]), ("vrope", [16] * 4)],
)
def test_allocations_of_64_pairs(name, counts):
    axis = SCHEMES[name].allocation(64)
    assert [axis.count(a) for a in range(SCHEMES[name].axes)] == counts
    if name == "mrope":
        assert axis == sorted(axis)
    if name == "mrope_interleaved":
        assert axis[:60] == [0, 1, 2] * 20 and axis[60:] == [0] * 4
    if name == "videorope":
        assert axis[:48] == [1, 2] * 24 and axis[48:] == [0] * 16


@every_scheme
@given(pairs=st.integers(1, 80))
def test_every_pair_has_an_axis(name, pairs):
    axis = SCHEMES[name].allocation(pairs)
    assert len(axis) == pairs and set(axis) <= {*range(SCHEMES[name].axes), *([None] if name == "hope" else [])}


def test_continuations_share_their_start():
    """Two answers to one prompt: both go on where it ended, and neither advances it."""
    table = layout([Text(3), SharedText(2), SharedText(2)], "rope")
    assert table.ids.tolist() == [[0, 1, 2, 3, 4, 3, 4]] and table.next_index == 3
    table = layout([Text(1), Video(1, 2, 2), SharedText(2), SharedText(1)], "vrope")
    assert table.ids[:, 5:].tolist() == [[4, 5, 4]] * 4 and table.next_index == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Video(0, 2, 2), r"Video\(t=0, h=2, w=2\): a medium has at least one frame, row and column"),
        (lambda: Image(2, 0), "at least one frame, row and column"),
        (lambda: Text(-1), r"Text\(length=-1\)"),
        (lambda: layout([Text(1)], "mrop"), "unknown position scheme 'mrop': choose one of rope, mrope"),
        (lambda: layout([Text(1)], "no.such.scheme"), "no position scheme at 'no.such.scheme'"),
        (lambda: layout([Text(1)], "os.path.join"), "'os.path.join' is a function, not a position Scheme"),
        (lambda: layout([Video(2, 1, 1)], "mrope", start=1 << 24), "past 2\\^24 = 16777216"),
        (lambda: layout([Text(5)], "vrope", start=(1 << 24) - 4), "positions reach 16777217"),
    ],
)
def test_refuses_what_has_no_position(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_largest_id_still_counts():
    assert layout([Text(4)], "vrope", start=(1 << 24) - 4).next_index == 1 << 24


def every_other(t: int, h: int, w: int, start: int) -> tuple[torch.Tensor, int]:
    return start + 2 * torch.arange(t * h * w).unsqueeze(0), start + 2 * t * h * w


OWN = Scheme("every_other", 1, every_other, lambda pairs: [0] * pairs)


def own_scheme(media=every_other, allocation=OWN.allocation, axes: int = 1) -> Scheme:
    return Scheme("mine", axes, media, allocation)


@pytest.mark.parametrize(
    ("media", "words"),
    [
        (lambda t, h, w, start: (torch.arange(h).unsqueeze(0), start), r"at torch.int64 \(1, 2\), 3; "),
        (lambda t, h, w, start: (torch.arange(t * h * w), start), r"at torch.int64 \(12,\), 3; "),
        (
            lambda t, h, w, start: (torch.zeros(2, t * h * w, dtype=torch.int64), start),
            r"at torch.int64 \(2, 12\), 3; ",
        ),
        (lambda t, h, w, start: (torch.zeros(1, t * h * w), start), r"at torch.float32 \(1, 12\), 3; "),
        (lambda t, h, w, start: (torch.zeros(1, t * h * w).long(), start + 0.5), r"at torch.int64 \(1, 12\), 3.5; "),
        (lambda t, h, w, start: torch.zeros(1, t * h * w).long(), r"at torch.int64 \(1, 12\); "),
    ],
)
def test_ids_of_a_scheme_of_ones_own_must_fit(media, words):
    with pytest.raises(
        ValueError, match=rf"scheme 'mine' places Video\(t=1, h=2, w=6\) {words}its media .* \(1, 12\) and"
    ):
        layout([Text(3), Video(1, 2, 6)], own_scheme(media))


@pytest.mark.parametrize(
    ("allocation", "shown"),
    [
        (lambda pairs: [0] * (pairs - 1), r"\[0, 0, 0\]"),
        (lambda pairs: [0, 1, 2, 3], r"\[0, 1, 2, 3\]"),
        (lambda pairs: [0, 1, -1, 0], r"\[0, 1, -1, 0\]"),
        (lambda pairs: [0.0] * pairs, r"\[0.0, 0.0, 0.0, 0.0\]"),
    ],
)
def test_axes_of_a_scheme_of_ones_own_must_fit(allocation, shown):
    with pytest.raises(ValueError, match=rf"scheme 'mine' allocates 4 pairs as {shown}; .* 4 integers in 0 .. 2"):
        own_scheme(allocation=allocation, axes=3).axes_of_pairs(4)
    assert own_scheme(allocation=lambda pairs: range(pairs), axes=4).axes_of_pairs(4) == [0, 1, 2, 3]


def test_a_scheme_of_ones_own_is_found_by_name_and_by_path():
    assert find_scheme("tests.unit.rotary.test_schemes.OWN").name == "every_other"
    with pytest.raises(ValueError, match="unknown position scheme 'every_other'"):
        find_scheme("every_other")
    try:
        register_scheme(OWN)
        assert layout([Video(1, 1, 2), Text(1)], "every_other").ids.tolist() == [[0, 2, 4]]
        with pytest.raises(ValueError, match="there is a position scheme 'every_other' already"):
            register_scheme(Scheme("every_other", 1, OWN.media, OWN.allocation))
    finally:
        SCHEMES.pop("every_other")
