"""The immutable record of a packed stream.

Shape legend: t tokens in the stream (pad included), u predicted tokens of the stream, r predicted tokens of the
responses: a token that k responses share counts once in u and k times in r. Without such tokens u = r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.grouping.tables import Segment, predict_tensors, response_counts, row_tensors, segments_of
from megatron_ext.prefix_tree import Nested, PrefixTree

__all__ = ["PrefixGroups"]


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
        segments = segments_of(trees)
        tensors = row_tensors(segments, num_pad) | predict_tensors(trees)
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

    @property
    def response_counts(self) -> Tensor:
        """int64 [t]: in how many responses a row's token stands, 0 on the pad. Their sum is `num_repeated_tokens`."""
        if "response_counts" not in self.derived:
            counts = response_counts(self.trees, self.num_pad_tokens)
            self.derived["response_counts"] = counts.to(self.position_ids.device)
        return self.derived["response_counts"]

    def repeated(self, pad_to_multiple: int = 1) -> PrefixGroups:
        """The same responses without sharing: one group, hence one copy of the prefix, per response."""
        lengths = [(t.prompt_length, [s]) for t in self.trees for s in t.response_lengths]
        return PrefixGroups.from_lengths(lengths, pad_to_multiple, self.position_ids.device)


_BUILD_KEY = object()
