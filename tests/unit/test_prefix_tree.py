"""Prefix trees from lengths and from tokens, and the streams they make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.grouping import PrefixGroups, pack, unpack
from megatron_ext.prefix_tree import PrefixTree
from tests.layouts import documents
from tests.strategies import nested_strategy

# Few tokens and a small vocabulary: responses often share a beginning, or end where another goes on.
responses_strategy = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=7)
prompt_strategy = st.lists(st.integers(0, 2), max_size=3)


def test_a_tree_by_hand():
    """Prompt of 3; responses [7 8 1], [7 8], [9], [7 8 2 5]: the first, second and fourth share two tokens."""
    prompt, responses = [1, 2, 3], [[7, 8, 1], [7, 8], [9], [7, 8, 2, 5]]
    tree = PrefixTree.from_token_lists([prompt + r for r in responses], 3)
    assert tree == PrefixTree((3, 2, 1, 0, 2, 1), (-1, 0, 1, 1, 1, 0), (2, 3, 5, 4))
    assert tree.first_positions == (0, 3, 5, 5, 5, 3)
    assert tree.response_lengths == (3, 2, 1, 4)
    batch = pack([prompt], [responses], min_shared=1)
    assert batch.tokens.tolist() == [1, 2, 3, 7, 8, 1, 2, 5, 9]
    groups = batch.groups
    assert groups.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 3]
    assert groups.predict_index.tolist() == [2, 3, 4, 4, 6, 2]
    assert groups.target_index.tolist() == [3, 4, 5, 6, 7, 8]
    assert groups.expand_index.tolist() == [0, 1, 2, 0, 1, 5, 0, 1, 3, 4]
    assert groups.response_ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]
    assert groups.response_token_index.tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 3]
    assert (groups.num_tokens, groups.num_predicted_tokens, groups.num_repeated_tokens) == (9, 10, 4 * 3 + 10)
    assert [s.parent for s in groups.segments] == [None, 0, 1, 1, 0]
    assert [s.response for s in groups.segments] == [None, None, 0, 3, 2]


def test_a_plain_group_is_a_tree_of_depth_one():
    sequences = [[1, 2, 3, r, r] for r in (4, 5, 6)]
    assert PrefixTree.from_token_lists(sequences, 3) == PrefixTree.from_nested((3, [2, 2, 2]))


@given(prompt_strategy, responses_strategy, st.integers(1, 3))
def test_every_path_spells_its_sequence(prompt, responses, min_shared):
    """In the caller's order; and siblings begin with different tokens, or share too few to be worth it."""
    sequences = [prompt + r for r in responses]
    tree = PrefixTree.from_token_lists(sequences, len(prompt), min_shared)
    stream = tree.flatten(sequences)
    assert len(stream) == tree.num_tokens <= len(prompt) + sum(map(len, responses))
    for sequence, leaf in zip(sequences, tree.leaves, strict=True):
        nodes = (0, *tree.path(leaf))
        assert [t for n in nodes for t in stream[tree.starts[n] : tree.starts[n] + tree.lengths[n]]] == sequence
    for node in range(len(tree.lengths)):
        texts = [
            stream[tree.starts[c] : tree.starts[c] + tree.lengths[c]]
            for c, parent in enumerate(tree.parents)
            if parent == node and tree.lengths[c]
        ]
        beginnings = [tuple(t[:min_shared]) for t in texts if len(t) >= min_shared]
        assert len(set(beginnings)) == len(beginnings)
    inner = set(tree.parents) - {-1, 0}
    assert all(tree.lengths[n] >= min_shared for n in inner)
    assert all(tree.parents[n] < n for n in range(len(tree.lengths)))


@given(prompt_strategy, responses_strategy, st.sampled_from([1, 8]))
def test_a_tree_predicts_what_plain_groups_predict(prompt, responses, pad):
    """The same response tokens, in the same order, from rows with the same token, position and context."""
    if not prompt and not any(responses):
        return
    plain, tree = pack([prompt], [responses], pad), pack([prompt], [responses], pad, min_shared=1)
    a, b = plain.groups, tree.groups
    assert a.response_lengths == b.response_lengths and a.num_responses == b.num_responses
    expand = b.expand_index if b.expand_index is not None else slice(None)
    assert plain.labels.tolist() == tree.labels[expand].tolist()
    assert a.response_ids.tolist() == b.response_ids.tolist()
    assert a.response_token_index.tolist() == b.response_token_index.tolist()
    assert plain.tokens[a.predict_index].tolist() == tree.tokens[b.predict_index[expand]].tolist()
    assert a.position_ids[a.predict_index].tolist() == b.position_ids[b.predict_index[expand]].tolist()
    assert len(set(b.target_index.tolist())) == len(b.target_index), "a shared token is predicted once"
    back = [x.tolist() for x in unpack(tree.labels[expand], b)]
    assert back == [r if prompt else r[1:] for r in responses]
    masks = [[t == 1 for t in r] for r in responses]
    assert plain.loss_mask(masks).tolist() == tree.loss_mask(masks).tolist()


@given(nested_strategy, st.sampled_from([1, 8]))
def test_positions_follow_the_paths(forest, pad):
    groups = PrefixGroups.from_lengths(forest, pad)
    position = {}
    for rows, _ in documents(forest):
        position |= {row: i for i, row in enumerate(rows)}
    assert groups.position_ids.tolist()[: len(position)] == [position[row] for row in range(len(position))]
    assert groups.num_responses == sum(ends for _, ends in documents(forest))
    assert groups.num_repeated_tokens == sum(len(rows) for rows, ends in documents(forest) if ends)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrefixTree.from_nested(5), "prompt length"),
        (lambda: PrefixTree.from_nested((2, [(1, [-1])])), "negative, got -1"),
        (lambda: PrefixTree.from_nested((2, ["x"])), "got 'x'"),
        (lambda: PrefixTree.from_token_lists([], 0), "at least one sequence"),
        (
            lambda: PrefixTree.from_token_lists([[1, 2], [1, 3]], 2),
            "sequence 1 does not begin with the 2 prompt tokens",
        ),
        (lambda: PrefixTree.from_token_lists([[1]], 2), "sequence 0"),
    ],
)
def test_refuses_what_is_no_tree(call, message):
    with pytest.raises(ValueError, match=message):
        call()
