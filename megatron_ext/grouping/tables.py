"""Segments of a stream and its index tensors, worked out from the lengths of its trees.

Shape legend: t tokens in the stream (pad included), u predicted tokens of the stream, r predicted tokens of the
responses: a token that k responses share counts once in u and k times in r. Without such tokens u = r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.prefix_tree import PrefixTree

__all__ = ["Segment", "predict_tensors", "response_counts", "row_tensors", "segments_of"]

PAD_GROUP = -1


@dataclass(frozen=True)
class Segment:
    """A contiguous run of rows: one node, not empty, of group `group`'s tree.

    `response` is the response of the group that ends with it, if one does; `parent` the segment before it on its path.
    """

    start: int
    length: int
    group: int
    node: int
    parent: int | None = None
    response: int | None = None
    first_position: int = 0

    @property
    def is_prefix(self) -> bool:
        """Whether this is the group's prompt."""
        return self.node == 0


def segments_of(trees: Sequence[PrefixTree]) -> tuple[Segment, ...]:
    """The segments in stream order, without empty ones."""
    segments: list[Segment] = []
    row = 0
    for group, tree in enumerate(trees):
        response = {leaf: number for number, leaf in enumerate(tree.leaves)}
        of_node: list[int | None] = []  # the segment of each node, or of its closest ancestor that has one
        for node, (length, parent) in enumerate(zip(tree.lengths, tree.parents, strict=True)):
            above = of_node[parent] if parent >= 0 else None
            of_node.append(len(segments) if length else above)
            if length:
                start, position = row + tree.starts[node], tree.first_positions[node]
                segments.append(Segment(start, length, group, node, above, response.get(node), position))
        row += tree.num_tokens
    return tuple(segments)


def row_tensors(segments: tuple[Segment, ...], num_pad: int) -> dict[str, Tensor]:
    """Per-row tensors, each [t]."""
    rows = list(segments)
    if num_pad:
        rows.append(Segment(segments[-1].start + segments[-1].length, num_pad, PAD_GROUP, 0))
    counts = torch.tensor([s.length for s in rows])

    def spread(values) -> Tensor:
        return torch.tensor(values).repeat_interleave(counts)

    first_row_to_position = spread([s.first_position - s.start for s in rows])
    return {
        "position_ids": torch.arange(int(counts.sum())) + first_row_to_position,
        "segment_ids": spread(list(range(len(rows)))),
        "group_ids": spread([s.group for s in rows]),
    }


def predict_tensors(trees: Sequence[PrefixTree]) -> dict[str, Tensor | None]:
    """`predict_index` and `target_index` [u], and per predicted token of each response [r]."""
    predict, target, expand, response, place = [], [], [], [], []
    row, count, number = 0, 0, 0
    for tree in trees:
        on_a_path = {node for leaf in tree.leaves for node in tree.path(leaf)}
        last_row = [-1] * len(tree.lengths)  # of each node, or of its closest ancestor that is not empty
        entries: dict[int, Tensor] = {}  # node -> its tokens' entries of predict_index
        for node, (length, parent) in enumerate(zip(tree.lengths, tree.parents, strict=True)):
            before = last_row[parent] if parent >= 0 else -1
            first = row + tree.starts[node]
            last_row[node] = first + length - 1 if length else before
            skip = 1 if before < 0 else 0  # nothing predicts the first token of a path
            if node not in on_a_path or length <= skip:
                continue
            rows = torch.arange(first, first + length)
            predicting = rows - 1
            predicting[0] = before
            predict.append(predicting[skip:])
            target.append(rows[skip:])
            entries[node] = torch.arange(count, count + length - skip)
            count += length - skip
        for leaf in tree.leaves:
            for node in tree.path(leaf):
                if node in entries:
                    end = tree.first_positions[node] + tree.lengths[node] - tree.prompt_length
                    expand.append(entries[node])
                    response.append(torch.full((len(entries[node]),), number))
                    place.append(torch.arange(end - len(entries[node]), end))
            number += 1
        row += tree.num_tokens

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    index = joined(expand)
    return {
        "predict_index": joined(predict),
        "target_index": joined(target),
        "expand_index": None if torch.equal(index, torch.arange(count)) else index,
        "response_ids": joined(response),
        "response_token_index": joined(place),
    }


def response_counts(trees: Sequence[PrefixTree], num_pad: int) -> Tensor:
    """int64 [t]: responses whose path goes through each row's node, 0 on the pad."""
    counts, lengths = [], []
    for tree in trees:
        through = [0] * len(tree.lengths)
        for leaf in tree.leaves:
            through[leaf] += 1
        for node in range(len(through) - 1, 0, -1):  # children come after their parents
            through[tree.parents[node]] += through[node]
        counts += through
        lengths += tree.lengths
    return torch.tensor([*counts, 0]).repeat_interleave(torch.tensor([*lengths, num_pad]))
