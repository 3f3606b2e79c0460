"""Prefix groups: the lengths of one packed stream, and everything that follows from them.

A *group* is one prefix (a prompt) with its suffixes (the responses). A stream packs any number of groups

    [ P1 | S11 S12 .. S1g | P2 | S21 .. S2h | ... | pad ]          t tokens, batch dimension 1

so that each prompt is encoded once for all of its responses (Prefix Grouper, arXiv 2506.05433). Where responses share
more than the prompt a group is a tree (`megatron_ext.prefix_tree`), its nodes in depth-first order; a plain group is a
tree of depth 1. `PrefixGroups` is the stream's immutable record. It is built once per microbatch from Python ints and
handed to the model as `packed_seq_params`; no layer has to look at the data to know the layout, so nothing waits for
the device.

Shape legend: t tokens in the stream (pad included), u predicted tokens of the stream, r predicted tokens of the
responses: a token that k responses share counts once in u and k times in r. Without such tokens u = r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.prefix_tree import Nested, PrefixTree

__all__ = ["PackedTokens", "PrefixGroups", "Segment", "StreamMedia", "pack", "unpack"]

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


class PrefixGroups(PackedSeqParams):
    """Immutable layout of a prefix-grouped stream. Build it with `from_lengths` or `from_trees`.

    Attributes:
        trees: one `PrefixTree` per group.
        num_tokens: t, rows of the stream including the tail pad.
        num_pad_tokens: rows of the tail pad. The pad is a causal segment of its own, because a row that sees no key
            has an infinite log-sum-exp and poisons gradients.
        segments: the segments in stream order, without the pad and without empty ones.
        position_ids: int64 [t]. A prefix counts 0..P-1, EVERY suffix of the group counts from P.
        segment_ids: int64 [t], the index of the row's segment (the pad has one of its own).
        group_ids: int64 [t], the index of the row's group, -1 on the pad.
        predict_index: int64 [u], the row whose logits predict each response token: the LAST PREFIX ROW for the first
            token of every suffix, then the row before. The first token of a suffix without prefix has no such row.
        target_index: int64 [u], the row that holds the predicted token.
        expand_index: int64 [r], the entry of `predict_index` behind each response's token; None where it is 0..r-1,
            because no two responses share a token.
        response_ids: int64 [r], which response of the stream (0..num_responses-1) the predicted token belongs to.
        response_token_index: int64 [r], the token's place within its response.
        num_responses: responses in the stream, empty ones included.
        num_predicted_tokens: r, known without looking at the device.
        predict_rows: `predict_index` on the host.
        derived: what others work out from the layout and keep with the record; no part of its identity.
    """

    trees: tuple[PrefixTree, ...]
    num_tokens: int
    num_pad_tokens: int
    segments: tuple[Segment, ...]
    position_ids: Tensor
    segment_ids: Tensor
    group_ids: Tensor
    predict_index: Tensor
    target_index: Tensor
    expand_index: Tensor | None
    response_ids: Tensor
    response_token_index: Tensor
    num_responses: int
    num_predicted_tokens: int
    predict_rows: Tensor
    derived: dict

    def __init__(self, *, _key: object = None, **fields):
        if _key is not _BUILD_KEY:
            raise TypeError("build PrefixGroups with PrefixGroups.from_lengths(...)")
        lengths = [s.length for s in fields["segments"]] + [fields["num_pad_tokens"]]
        cu_seqlens = torch.tensor([0] + [n for n in lengths if n], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        cu_seqlens = cu_seqlens.to(fields["position_ids"].device)
        longest = max(lengths)
        # 'sbhd' and not 'thd': Megatron's 'thd' rotary restarts at every boundary, which is wrong for a suffix.
        super().__init__(
            qkv_format="sbhd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "derived", {})
        object.__setattr__(self, "_frozen", True)

    def __setattr__(self, name, value):
        if getattr(self, "_frozen", False):
            raise AttributeError(f"PrefixGroups is immutable: cannot set {name!r}; build a new record")
        object.__setattr__(self, name, value)

    def __eq__(self, other) -> bool:
        return isinstance(other, PrefixGroups) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash(self.layout)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{t.prompt_length} + {list(t.response_lengths)}" for t in self.trees)
        return f"PrefixGroups({shapes}; num_tokens={self.num_tokens}, pad={self.num_pad_tokens})"

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[tuple[int, Sequence[Nested]]],
        pad_to_multiple: int = 1,
        device: torch.device | str = "cpu",
    ) -> PrefixGroups:
        """Lay out groups of given lengths in one stream.

        Args:
            lengths: one `(prefix length, [response lengths])` per group, or deeper, see `PrefixTree.from_nested`. Zero
                is legal everywhere: an empty prefix, an empty response, a group without responses.
            pad_to_multiple: the stream's length is brought to a multiple of this by a tail pad segment.
            device: where the index tensors are made.

        Raises:
            UserError: no token at all, a negative length, or a pad multiple below 1.
        """
        return cls.from_trees([PrefixTree.from_nested(group) for group in lengths], pad_to_multiple, device)

    @classmethod
    def from_trees(
        cls, trees: Sequence[PrefixTree], pad_to_multiple: int = 1, device: torch.device | str = "cpu"
    ) -> PrefixGroups:
        """Lay out trees in one stream; see `from_lengths`."""
        if pad_to_multiple < 1:
            raise UserError(f"pad_to_multiple must be at least 1, got {pad_to_multiple}")
        num_real = sum(tree.num_tokens for tree in trees)
        if num_real == 0:
            raise UserError("a stream needs at least one token, got only empty groups")
        num_pad = -num_real % pad_to_multiple
        segments = tuple(_segments(trees))
        tensors = _row_tensors(segments, num_pad) | _predict_tensors(trees)
        return cls(
            _key=_BUILD_KEY,
            trees=tuple(trees),
            num_tokens=num_real + num_pad,
            num_pad_tokens=num_pad,
            segments=segments,
            num_responses=sum(len(tree.leaves) for tree in trees),
            num_predicted_tokens=len(tensors["response_ids"]),
            predict_rows=tensors["predict_index"],
            **{name: None if x is None else x.to(device) for name, x in tensors.items()},
        )

    @property
    def layout(self) -> tuple:
        """Hashable description of the stream: equal layouts have equal attention plans."""
        return (self.trees, self.num_pad_tokens)

    @property
    def num_response_tokens(self) -> int:
        """Tokens of all responses, shared ones counted for each."""
        return sum(self.response_lengths)

    @property
    def response_lengths(self) -> tuple[int, ...]:
        """Length of every response, in stream order."""
        return tuple(s for tree in self.trees for s in tree.response_lengths)

    @property
    def num_repeated_tokens(self) -> int:
        """Tokens the same responses cost when every one carries its own copy of the prefix (no padding)."""
        return sum(len(t.leaves) * t.prompt_length + sum(t.response_lengths) for t in self.trees)

    def repeated(self, pad_to_multiple: int = 1) -> PrefixGroups:
        """The same responses without sharing: one group, hence one copy of the prefix, per response."""
        lengths = [(t.prompt_length, [s]) for t in self.trees for s in t.response_lengths]
        return PrefixGroups.from_lengths(lengths, pad_to_multiple, self.position_ids.device)


_BUILD_KEY = object()


def _segments(trees: Sequence[PrefixTree]) -> list[Segment]:
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
    return segments


def _row_tensors(segments: tuple[Segment, ...], num_pad: int) -> dict[str, Tensor]:
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


def _predict_tensors(trees: Sequence[PrefixTree]) -> dict[str, Tensor | None]:
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


@dataclass(frozen=True, eq=False)
class StreamMedia:
    """What stands in a stream instead of token embeddings.

    Attributes:
        features: [n, f], each once, however often the stream repeats its prompt.
        rows: int64 [m], on the host: the rows they stand in.
        index: int64 [m], on the host: the feature of each of these rows.
    """

    features: Tensor
    rows: Tensor
    index: Tensor


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """A packed token batch: `tokens` int64 [t] and the record that says what is where.

    Attributes:
        media: images and videos in the stream.
        scheme_ids: int64 [axes, t], positions where they differ from the record's, which is where there are media.
    """

    tokens: Tensor
    groups: PrefixGroups
    media: StreamMedia | None = None
    scheme_ids: Tensor | None = None

    @property
    def position_ids(self) -> Tensor:
        """int64 [axes, t]; one axis, which stands for all, where there is only text."""
        return self.groups.position_ids.unsqueeze(0) if self.scheme_ids is None else self.scheme_ids

    @property
    def labels(self) -> Tensor:
        """int64 [u]: the token to predict from each row of `groups.predict_index`."""
        return self.tokens[self.groups.target_index]

    def loss_mask(self, response_masks: Sequence[Sequence[bool]] | None = None) -> Tensor:
        """bool [r]: which predicted tokens count. Without masks every response token does.

        Args:
            response_masks: one mask per response of the stream, in stream order, as long as the response.
        """
        groups = self.groups
        if response_masks is None:
            return torch.ones(groups.num_predicted_tokens, dtype=torch.bool, device=self.tokens.device)
        lengths = [len(m) for m in response_masks]
        if lengths != list(groups.response_lengths):
            raise UserError(f"response masks of lengths {lengths} do not fit responses of {groups.response_lengths}")
        flat = torch.tensor([bool(x) for mask in response_masks for x in mask], dtype=torch.bool)
        first = torch.tensor([0, *lengths]).cumsum(0)[:-1].to(groups.response_ids.device)
        index = first[groups.response_ids] + groups.response_token_index
        return flat.to(self.tokens.device)[index]


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    pad_to_multiple: int = 1,
    pad_token: int = 0,
    device: torch.device | str = "cpu",
    share_prefix: bool = True,
    min_shared: int | None = None,
) -> PackedTokens:
    """Pack prompts and their responses into one stream.

    Args:
        prompts: token ids of each prompt.
        responses: for each prompt, the token ids of its responses.
        share_prefix: False repeats the prompt for every response: the plain form of the same batch.
        min_shared: also share what responses of a prompt have in common, from this many tokens on; see
            `PrefixTree.from_token_lists`. None: the prompt only.

    Raises:
        UserError: `prompts` and `responses` differ in length, or there is no token.
    """
    if len(prompts) != len(responses):
        raise UserError(f"{len(prompts)} prompts but responses for {len(responses)}")
    if not share_prefix:
        prompts, responses = (
            [p for p, rs in zip(prompts, responses, strict=True) for _ in rs],
            [[r] for rs in responses for r in rs],
        )
    trees, flat = [], []
    for prompt, group in zip(prompts, responses, strict=True):
        if min_shared is None or not group:
            trees.append(PrefixTree.from_nested((len(prompt), [len(r) for r in group])))
            flat += [*prompt, *(token for r in group for token in r)]
        else:
            sequences = [[*prompt, *r] for r in group]
            trees.append(PrefixTree.from_token_lists(sequences, len(prompt), min_shared))
            flat += trees[-1].flatten(sequences)
    groups = PrefixGroups.from_trees(trees, pad_to_multiple, device)
    flat += [pad_token] * groups.num_pad_tokens
    return PackedTokens(torch.tensor(flat, dtype=torch.int64, device=device), groups)


def unpack(values: Tensor, groups: PrefixGroups) -> list[Tensor]:
    """Split per-predicted-token values [r] into one tensor per response, in stream order.

    A response of a group with an empty prefix comes back one shorter than it is: its first token is not predicted.
    """
    counts = [s if t.prompt_length else max(s - 1, 0) for t in groups.trees for s in t.response_lengths]
    return list(values.split(counts))
