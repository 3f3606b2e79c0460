"""Prefix groups: the lengths of one packed stream, and everything that follows from them.

A *group* is one prefix (a prompt) with its suffixes (the responses). A stream packs any number of groups

    [ P1 | S11 S12 .. S1g | P2 | S21 .. S2h | ... | pad ]          t tokens, batch dimension 1

so that each prompt is encoded once for all of its responses (Prefix Grouper, arXiv 2506.05433). `PrefixGroups` is
the stream's immutable record. It is built once per microbatch from Python ints and handed to the model as
`packed_seq_params`; no layer has to look at the data to know the layout, so nothing waits for the device.

Shape legend: t tokens in the stream (pad included), r predicted tokens, i.e. response tokens that some row predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

__all__ = ["PackedTokens", "PrefixGroups", "Segment", "pack", "unpack"]

PAD_GROUP = -1


@dataclass(frozen=True)
class Segment:
    """A contiguous run of rows: a prefix (`response` is None) or one response of group `group`."""

    start: int
    length: int
    group: int
    response: int | None = None
    first_position: int = 0

    @property
    def is_prefix(self) -> bool:
        return self.response is None


class PrefixGroups(PackedSeqParams):
    """Immutable layout of a prefix-grouped stream. Build it with `from_lengths`.

    Attributes:
        lengths: ((P, (S1, S2, ...)), ...), the ints it was made from.
        num_tokens: t, rows of the stream including the tail pad.
        num_pad_tokens: rows of the tail pad. The pad is a causal segment of its own, because a row that sees no key
            has an infinite log-sum-exp and poisons gradients.
        segments: the segments in stream order, without the pad and without empty ones.
        position_ids: int64 [t]. A prefix counts 0..P-1, EVERY suffix of the group counts from P.
        segment_ids: int64 [t], the index of the row's segment (the pad has one of its own).
        group_ids: int64 [t], the index of the row's group, -1 on the pad.
        is_prefix: bool [t].
        predict_index: int64 [r], the row whose logits predict each response token: the LAST PREFIX ROW for the first
            token of every suffix, then the row before. The first token of a suffix without prefix has no such row.
        target_index: int64 [r], the row that holds the predicted token.
        response_ids: int64 [r], which response of the stream (0..num_responses-1) the predicted token belongs to.
        response_token_index: int64 [r], the token's place within its response.
        num_responses: responses in the stream, empty ones included.
    """

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
        return f"PrefixGroups({list(self.lengths)}, num_tokens={self.num_tokens}, pad={self.num_pad_tokens})"

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[tuple[int, Sequence[int]]],
        pad_to_multiple: int = 1,
        device: torch.device | str = "cpu",
    ) -> PrefixGroups:
        """Lay out groups of given lengths in one stream.

        Args:
            lengths: one `(prefix length, [response lengths])` per group. Zero is legal everywhere: an empty prefix,
                an empty response, a group without responses.
            pad_to_multiple: the stream's length is brought to a multiple of this by a tail pad segment.
            device: where the index tensors are made.

        Raises:
            ValueError: no token at all, a negative length, or a pad multiple below 1.
        """
        frozen = tuple((int(p), tuple(int(s) for s in suffixes)) for p, suffixes in lengths)
        if pad_to_multiple < 1:
            raise ValueError(f"pad_to_multiple must be at least 1, got {pad_to_multiple}")
        for g, (p, suffixes) in enumerate(frozen):
            if p < 0 or any(s < 0 for s in suffixes):
                raise ValueError(f"lengths must not be negative, got group {g} = {(p, list(suffixes))}")
        num_real = sum(p + sum(suffixes) for p, suffixes in frozen)
        if num_real == 0:
            raise ValueError("a stream needs at least one token, got only empty groups")
        num_pad = -num_real % pad_to_multiple
        segments = tuple(_segments(frozen))
        return cls(
            _key=_BUILD_KEY,
            lengths=frozen,
            num_tokens=num_real + num_pad,
            num_pad_tokens=num_pad,
            segments=segments,
            num_responses=sum(len(suffixes) for _, suffixes in frozen),
            **_row_tensors(segments, num_pad, torch.device(device)),
            **_predict_tensors(frozen, torch.device(device)),
        )

    @property
    def layout(self) -> tuple:
        """Hashable description of the stream: equal layouts have equal attention plans."""
        return (self.lengths, self.num_pad_tokens)

    @property
    def num_predicted_tokens(self) -> int:
        """r, rows of `predict_index`, known without looking at the device."""
        return sum(sum(s if p else max(s - 1, 0) for s in suffixes) for p, suffixes in self.lengths)

    @property
    def num_response_tokens(self) -> int:
        return sum(sum(suffixes) for _, suffixes in self.lengths)

    @property
    def response_lengths(self) -> tuple[int, ...]:
        """Length of every response, in stream order."""
        return tuple(s for _, suffixes in self.lengths for s in suffixes)

    @property
    def num_repeated_tokens(self) -> int:
        """Tokens the same responses cost when every one carries its own copy of the prefix (no padding)."""
        return sum(len(suffixes) * p + sum(suffixes) for p, suffixes in self.lengths)

    def repeated(self, pad_to_multiple: int = 1) -> PrefixGroups:
        """The same responses without sharing: one group, hence one copy of the prefix, per response."""
        lengths = [(p, [s]) for p, suffixes in self.lengths for s in suffixes]
        return PrefixGroups.from_lengths(lengths, pad_to_multiple, self.position_ids.device)


_BUILD_KEY = object()


def _segments(lengths) -> list[Segment]:
    segments, row = [], 0
    for g, (p, suffixes) in enumerate(lengths):
        if p:
            segments.append(Segment(row, p, g))
        row += p
        for j, s in enumerate(suffixes):
            if s:
                segments.append(Segment(row, s, g, response=j, first_position=p))
            row += s
    return segments


def _row_tensors(segments: tuple[Segment, ...], num_pad: int, device: torch.device) -> dict[str, Tensor]:
    """Per-row tensors, each [t]."""
    rows = list(segments)
    if num_pad:
        rows.append(Segment(segments[-1].start + segments[-1].length, num_pad, PAD_GROUP))
    counts = torch.tensor([s.length for s in rows])

    def spread(values) -> Tensor:
        return torch.tensor(values).repeat_interleave(counts)

    first_row_to_position = spread([s.first_position - s.start for s in rows])
    tensors = {
        "position_ids": torch.arange(int(counts.sum())) + first_row_to_position,
        "segment_ids": spread(list(range(len(rows)))),
        "group_ids": spread([s.group for s in rows]),
        "is_prefix": spread([s.is_prefix and s.group != PAD_GROUP for s in rows]),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _predict_tensors(lengths, device: torch.device) -> dict[str, Tensor]:
    """Per-predicted-token tensors, each [r]."""
    predict, target, response, place = [], [], [], []
    row, number = 0, 0
    for p, suffixes in lengths:
        last_prefix_row = row + p - 1
        row += p
        for s in suffixes:
            skip = 0 if p else 1  # without a prefix no row predicts the first token
            if s > skip:
                rows = torch.arange(row, row + s)
                before = rows - 1
                if p:
                    before[0] = last_prefix_row
                predict.append(before[skip:])
                target.append(rows[skip:])
                response.append(torch.full((s - skip,), number))
                place.append(torch.arange(skip, s))
            row += s
            number += 1
    names = ("predict_index", "target_index", "response_ids", "response_token_index")
    empty = torch.empty(0, dtype=torch.int64)
    return {
        name: (torch.cat(parts) if parts else empty).to(device)
        for name, parts in zip(names, (predict, target, response, place), strict=True)
    }


@dataclass(frozen=True)
class PackedTokens:
    """A packed token batch: `tokens` int64 [t] and the record that says what is where."""

    tokens: Tensor
    groups: PrefixGroups

    @property
    def labels(self) -> Tensor:
        """int64 [r]: the token to predict from each row of `groups.predict_index`."""
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
            raise ValueError(f"response masks of lengths {lengths} do not fit responses of {groups.response_lengths}")
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
) -> PackedTokens:
    """Pack prompts and their responses into one stream.

    Args:
        prompts: token ids of each prompt.
        responses: for each prompt, the token ids of its responses.
        share_prefix: False repeats the prompt for every response: the plain form of the same batch.

    Raises:
        ValueError: `prompts` and `responses` differ in length, or there is no token.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but responses for {len(responses)}")
    if not share_prefix:
        prompts, responses = (
            [p for p, rs in zip(prompts, responses, strict=True) for _ in rs],
            [[r] for rs in responses for r in rs],
        )
    lengths = [(len(p), [len(r) for r in rs]) for p, rs in zip(prompts, responses, strict=True)]
    groups = PrefixGroups.from_lengths(lengths, pad_to_multiple, device)
    flat: list[int] = []
    for p, rs in zip(prompts, responses, strict=True):
        flat.extend(p)
        for r in rs:
            flat.extend(r)
    flat.extend([pad_token] * groups.num_pad_tokens)
    return PackedTokens(torch.tensor(flat, dtype=torch.int64, device=device), groups)


def unpack(values: Tensor, groups: PrefixGroups) -> list[Tensor]:
    """Split per-predicted-token values [r] into one tensor per response, in stream order.

    A response of a group with an empty prefix comes back one shorter than it is: its first token is not predicted.
    """
    counts = [s if p else max(s - 1, 0) for p, suffixes in groups.lengths for s in suffixes]
    return list(values.split(counts))
