"""PrefixGroups: hand-made layouts, and what must hold for any lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ext.grouping import PackedTokens, PrefixGroups, pack, unpack
from megatron_ext.prefix_tree import PrefixTree
from tests.layouts import Lengths, spans
from tests.strategies import lengths_strategy

pads = st.sampled_from([1, 2, 8, 16])


def test_two_groups_by_hand():
    """P=3 with responses of 2 and 1, then P=2 with one of 3, padded to 16: every field written out."""
    groups = PrefixGroups.from_lengths([(3, [2, 1]), (2, [3])], pad_to_multiple=16)
    assert groups.trees == (PrefixTree.from_nested((3, [2, 1])), PrefixTree.from_nested((2, [3])))
    assert (groups.num_tokens, groups.num_pad_tokens) == (16, 5)
    #                                     P1       S11   S12 P2    S21      pad
    assert groups.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert groups.segment_ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 5]
    assert groups.group_ids.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1]
    assert groups.expand_index is None
    # Row 2, the last of the first prompt, predicts the first token of BOTH its responses.
    assert groups.predict_index.tolist() == [2, 3, 2, 7, 8, 9]
    assert groups.target_index.tolist() == [3, 4, 5, 8, 9, 10]
    assert groups.response_ids.tolist() == [0, 0, 1, 2, 2, 2]
    assert groups.response_token_index.tolist() == [0, 1, 0, 0, 1, 2]
    assert groups.cu_seqlens_q.tolist() == groups.cu_seqlens_kv.tolist() == [0, 3, 5, 6, 8, 11, 16]
    assert groups.cu_seqlens_q.dtype == torch.int32
    assert groups.max_seqlen_q == groups.max_seqlen_kv == 5
    assert (groups.num_responses, groups.num_predicted_tokens, groups.num_response_tokens) == (3, 6, 6)
    assert groups.response_lengths == (2, 1, 3)
    assert groups.num_repeated_tokens == (3 + 2) + (3 + 1) + (2 + 3)
    assert [(s.start, s.length, s.group, s.response) for s in groups.segments] == [
        (0, 3, 0, None), (3, 2, 0, 0), (5, 1, 0, 1), (6, 2, 1, None), (8, 3, 1, 0),
    ]  # fmt: skip


def test_empty_prefix_and_empty_response_by_hand():
    """Without a prefix the first token of a response has no predicting row; an empty response keeps its number."""
    groups = PrefixGroups.from_lengths([(0, [2, 0, 3]), (2, [0, 1])])
    assert groups.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert groups.segment_ids.tolist() == [0, 0, 1, 1, 1, 2, 2, 3]
    assert groups.predict_index.tolist() == [0, 2, 3, 6]
    assert groups.target_index.tolist() == [1, 3, 4, 7]
    assert groups.response_ids.tolist() == [0, 2, 2, 4]
    assert groups.response_token_index.tolist() == [1, 1, 2, 0]
    assert (groups.num_responses, groups.num_pad_tokens, groups.num_predicted_tokens) == (5, 0, 4)


@given(lengths_strategy, pads)
def test_every_row_has_its_place(lengths: Lengths, pad: int):
    """Positions, segments, groups and document borders follow the rows, worked out here again one row at a time."""
    groups = PrefixGroups.from_lengths(lengths, pad)
    position, group_id, borders = [], [], [0]
    for g, (prefix_rows, responses) in enumerate(spans(lengths)):
        for first, rows in [(0, prefix_rows), *((len(prefix_rows), r) for r in responses)]:
            position += [first + i for i in range(len(rows))]
            group_id += [g] * len(rows)
            if rows:
                borders.append(borders[-1] + len(rows))
    num_pad = -len(position) % pad
    if num_pad:
        borders.append(borders[-1] + num_pad)
    assert groups.num_tokens == len(position) + num_pad
    assert groups.num_tokens % pad == 0 and groups.num_pad_tokens == num_pad < pad
    assert groups.position_ids.tolist() == position + list(range(num_pad))
    assert groups.group_ids.tolist() == group_id + [-1] * num_pad
    assert groups.cu_seqlens_q.tolist() == borders
    sizes = [b - a for a, b in zip(borders, borders[1:], strict=False)]
    assert groups.segment_ids.tolist() == [i for i, n in enumerate(sizes) for _ in range(n)]
    assert groups.max_seqlen_q == max(sizes)


@given(lengths_strategy, pads)
def test_every_response_token_is_predicted_once_by_the_row_before(lengths: Lengths, pad: int):
    """The first token by the last prefix row, the others by their neighbour; only a first token without prefix by none."""
    groups = PrefixGroups.from_lengths(lengths, pad)
    expected, number = [], 0
    for prefix_rows, responses in spans(lengths):
        for rows in responses:
            for place, row in enumerate(rows):
                if place:
                    expected.append((row - 1, row, number, place))
                elif prefix_rows:
                    expected.append((prefix_rows[-1], row, number, place))
            number += 1
    fields = (groups.predict_index, groups.target_index, groups.response_ids, groups.response_token_index)
    found = list(zip(*(f.tolist() for f in fields), strict=True))
    assert found == expected
    assert groups.num_predicted_tokens == len(expected) == len({target for _, target, _, _ in found})
    assert groups.num_responses == number


@given(lengths_strategy, pads, st.randoms(use_true_random=False))
def test_repeating_the_prefix_keeps_the_targets(lengths: Lengths, pad: int, random):
    """`repeated()` and `pack(share_prefix=False)`: same tokens to predict, same positions, same context, in order."""
    prompts = [[random.randrange(100) for _ in range(p)] for p, _ in lengths]
    responses = [[[random.randrange(100) for _ in range(n)] for n in s] for _, s in lengths]
    assume(any(p + sum(s) for p, s in lengths if s))  # groups without responses vanish when prefixes are repeated
    shared = pack(prompts, responses, pad)
    repeated = pack(prompts, responses, pad, share_prefix=False)
    assert shared.groups.repeated(pad) == repeated.groups
    assert repeated.groups.num_tokens - repeated.groups.num_pad_tokens == shared.groups.num_repeated_tokens
    assert shared.labels.tolist() == repeated.labels.tolist()
    for a, b in ((shared, repeated), (repeated, shared)):
        assert torch.equal(a.groups.response_ids, b.groups.response_ids)
        assert torch.equal(a.groups.response_token_index, b.groups.response_token_index)
        for field in ("predict_index", "target_index"):
            index_a, index_b = getattr(a.groups, field), getattr(b.groups, field)
            assert torch.equal(a.tokens[index_a], b.tokens[index_b])
            assert torch.equal(a.groups.position_ids[index_a], b.groups.position_ids[index_b])


@given(lengths_strategy, pads, st.randoms(use_true_random=False))
def test_pack_keeps_every_token_and_unpack_gives_responses_back(lengths: Lengths, pad: int, random):
    prompts = [[random.randrange(100) for _ in range(p)] for p, _ in lengths]
    responses = [[[random.randrange(100) for _ in range(n)] for n in s] for _, s in lengths]
    batch = pack(prompts, responses, pad, pad_token=777)
    tokens = batch.tokens.tolist()
    for (prefix_rows, response_rows), prompt, rs in zip(spans(lengths), prompts, responses, strict=True):
        assert [tokens[i] for i in prefix_rows] == prompt
        assert [[tokens[i] for i in rows] for rows in response_rows] == rs
    assert tokens[len(tokens) - batch.groups.num_pad_tokens :] == [777] * batch.groups.num_pad_tokens
    back = [part.tolist() for part in unpack(batch.labels, batch.groups)]
    assert back == [r if prompt else r[1:] for prompt, rs in zip(prompts, responses, strict=True) for r in rs]


def test_loss_mask_follows_the_responses():
    batch = pack([[1, 2], []], [[[3, 4, 5], []], [[6, 7]]], pad_to_multiple=8)
    assert batch.loss_mask().tolist() == [True] * 4
    masks = [[True, False, True], [], [True, False]]  # the last response's first token is not predicted
    mask = batch.loss_mask(masks)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match=r"lengths \[3, 1, 2\] do not fit responses of \(3, 0, 2\)"):
        batch.loss_mask([[True] * 3, [True], [True] * 2])


def test_is_immutable_hashable_and_compares_by_layout():
    a = PrefixGroups.from_lengths([(3, [2, 1])], 8)
    b = PrefixGroups.from_lengths(((3, (2, 1)),), 8)
    assert isinstance(a, PackedSeqParams)
    assert a.qkv_format == "sbhd"  # 'thd' would make Megatron restart the positions of every response
    assert a == b and hash(a) == hash(b) and a is not b
    assert a != PrefixGroups.from_lengths([(3, [1, 2])], 8)
    assert a != PrefixGroups.from_lengths([(3, [2, 1])], 1)
    for name in ("num_tokens", "position_ids", "cu_seqlens_q", "anything_new"):
        with pytest.raises(AttributeError, match=f"immutable.*{name}"):
            setattr(a, name, None)
    assert a.num_tokens == 8
    with pytest.raises(TypeError, match="from_lengths"):
        PrefixGroups()
    with pytest.raises(AttributeError):
        PackedTokens(torch.zeros(8), a).tokens = None


@pytest.mark.parametrize(
    ("lengths", "pad", "message"),
    [
        ([], 1, "at least one token"),
        ([(0, [])], 1, "at least one token"),
        ([(0, [0, 0])], 16, "at least one token"),
        ([(2, [1]), (-1, [2])], 1, r"negative, got -1 in \(-1, \[2\]\)"),
        ([(2, [1, -3])], 1, r"negative, got -3 in \(2, \[1, -3\]\)"),
        ([(2, [1])], 0, "pad_to_multiple must be at least 1, got 0"),
    ],
)
def test_refuses_impossible_lengths(lengths, pad, message):
    with pytest.raises(ValueError, match=message):
        PrefixGroups.from_lengths(lengths, pad)


def test_pack_refuses_prompts_without_their_responses():
    with pytest.raises(ValueError, match="2 prompts but responses for 1"):
        pack([[1], [2]], [[[3]]])
