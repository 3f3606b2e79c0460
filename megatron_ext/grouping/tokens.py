"""Token lists to a packed stream, and values per predicted token back to responses.

Shape legend: t tokens in the stream (pad included), u predicted tokens of the stream, r predicted tokens of the
responses: a token that k responses share counts once in u and k times in r. Without such tokens u = r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.grouping.record import PrefixGroups
from megatron_ext.prefix_tree import PrefixTree

__all__ = ["PackedTokens", "StreamEntry", "StreamMedia", "pack", "unpack"]


@dataclass(frozen=True, eq=False)
class StreamMedia:
    """What stands in a stream instead of token embeddings.

    Attributes:
        content: features [n, f], or of each medium what a vision tower is shown; each once, however often the stream repeats
            its prompt.
        rows: int64 [m], on the host: the rows they stand in.
        index: int64 [m], on the host: the feature of each of these rows.
    """

    content: Tensor | Sequence[Any]
    rows: Tensor
    index: Tensor


@dataclass(frozen=True, eq=False)
class StreamEntry:
    """Where a stream enters a model, if not at its tokens: what lies below is not run.

    Attributes:
        block: counted from 0 over all pipeline stages.
        hidden: [t, 1, h], what enters the block, on the stage that has it; None on others.
    """

    block: int
    hidden: Tensor | None


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """A packed token batch: `tokens` int64 [t] and the record that says what is where.

    Attributes:
        media: images and videos in the stream.
        scheme_ids: int64 or float64 [axes, t], positions where they differ from the record's, which is where there are media.
        entry: the block that it enters the model at; None: its tokens are embedded.
    """

    tokens: Tensor
    groups: PrefixGroups
    media: StreamMedia | None = None
    scheme_ids: Tensor | None = None
    entry: StreamEntry | None = None

    @property
    def position_ids(self) -> Tensor:
        """int64 or float64 [axes, t]; one axis, which stands for all, where there is only text."""
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
        if response_masks is None:
            return torch.ones(self.groups.num_predicted_tokens, dtype=torch.bool, device=self.tokens.device)
        return self.predicted(response_masks, torch.bool)

    def predicted(self, values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        """[r]: of each predicted token the value that its response has for it.

        Args:
            values: for each response of the stream, in stream order, one for each of its tokens.
        """
        groups, lengths = self.groups, [len(v) for v in values]
        if lengths != list(groups.response_lengths):
            raise UserError(f"values of lengths {lengths} do not fit responses of {groups.response_lengths}")
        flat = torch.tensor([x for each in values for x in each], dtype=dtype)
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
