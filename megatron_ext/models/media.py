"""Prompts with images and videos: which tokens stand for them, where those stand, and what the model sees instead.

A medium's tokens are placeholders in the prompt. Their rows get the medium's projected features in place of token
embeddings, and positions by the model's scheme; what follows a prompt starts at the prompt's next index, which is not
its number of tokens.

Shape legend: t rows of the stream, n media tokens of its prompts, f features of one, h hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.grouping import PackedTokens, PrefixGroups, StreamMedia, pack
from megatron_ext.rotary import Item, Scheme, Text, Video, find_scheme, layout

__all__ = ["MediaPrompt", "MediaProjector", "next_position", "pack_prompts", "stream_positions"]


@dataclass(frozen=True, eq=False)
class MediaPrompt:
    """A prompt with media. Build it with `of`.

    Attributes:
        tokens: token ids, placeholders included.
        items: texts and media in the order of the tokens.
        features: of all media tokens, [n, f], in the order of the tokens.
    """

    tokens: list[int]
    items: tuple[Item, ...]
    features: Tensor

    @classmethod
    def of(cls, tokens: Sequence[int], placeholder: int, media: Sequence[Video], features: Tensor) -> MediaPrompt:
        """Find the media among the tokens.

        Args:
            tokens: one `placeholder` for every token of every medium, media in order.
            features: [n, f].

        Raises:
            UserError: a number of placeholders or of features that does not fit the media.
        """
        expected = sum(m.length for m in media)
        grids = ", ".join(f"{m.t} x {m.h} x {m.w}" for m in media) or "none"
        found = sum(token == placeholder for token in tokens)
        if found != expected:
            raise UserError(
                f"the prompt has {found} placeholder tokens, its media ({grids}) have {expected}: write one for each token "
                "of each grid"
            )
        if features.dim() != 2 or len(features) != expected:
            raise UserError(f"media ({grids}) have {expected} tokens, features are {tuple(features.shape)}")
        items: list[Item] = []
        row, waiting = 0, list(media)
        while row < len(tokens):
            if tokens[row] == placeholder:
                medium = waiting.pop(0)
                if any(token != placeholder for token in tokens[row : row + medium.length]):
                    raise UserError(f"text stands among the {medium.length} placeholders of {medium}")
                items.append(medium)
            else:
                end = row
                while end < len(tokens) and tokens[end] != placeholder:
                    end += 1
                items.append(Text(end - row))
            row += items[-1].length
        return cls(list(tokens), tuple(items), features)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def media_rows(self) -> Tensor:
        """int64 [n]: rows of the prompt that hold media."""
        rows, row = [torch.empty(0, dtype=torch.int64)], 0
        for item in self.items:
            if isinstance(item, Video):
                rows.append(torch.arange(row, row + item.length))
            row += item.length
        return torch.cat(rows)


Prompt = Sequence[int] | MediaPrompt


def _tokens(prompt: Prompt) -> Sequence[int]:
    return prompt.tokens if isinstance(prompt, MediaPrompt) else prompt


def next_position(prompt: Prompt, scheme: str | Scheme) -> int:
    """Where what follows a prompt starts."""
    return layout(prompt.items, scheme).next_index if isinstance(prompt, MediaPrompt) else len(prompt)


def stream_positions(groups: PrefixGroups, prompts: Sequence[Prompt], scheme: str | Scheme) -> Tensor:
    """int64 [axes, t]: positions of a stream whose groups have these prompts.

    Every continuation starts at its prompt's next index, on every axis, however deep it stands in the tree.
    """
    scheme = find_scheme(scheme) if isinstance(scheme, str) else scheme
    device = groups.position_ids.device
    ids = groups.position_ids.expand(scheme.axes, -1).clone()  # [axes, t]: right for text
    row = 0
    for tree, prompt in zip(groups.trees, prompts, strict=True):
        if isinstance(prompt, MediaPrompt):
            table, length = layout(prompt.items, scheme), len(prompt)
            ids[:, row : row + length] = table.ids.to(device)
            ids[:, row + length : row + tree.num_tokens] += table.next_index - length
        row += tree.num_tokens
    return ids


def pack_prompts(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Sequence[int]]],
    scheme: str | Scheme,
    pad_to_multiple: int = 1,
    device: torch.device | str = "cpu",
    share_prefix: bool = True,
    min_shared: int | None = None,
) -> PackedTokens:
    """`grouping.pack` for prompts of which some may have media; those bring positions and features with them."""
    batch = pack(
        [_tokens(p) for p in prompts],
        responses,
        pad_to_multiple,
        device=device,
        share_prefix=share_prefix,
        min_shared=min_shared,
    )
    if not share_prefix:
        prompts = [p for p, rs in zip(prompts, responses, strict=True) for _ in rs]
    first_feature: dict[MediaPrompt, int] = {}  # of each prompt, once however often it stands in the stream
    rows, index, row, count = [], [], 0, 0
    for tree, prompt in zip(batch.groups.trees, prompts, strict=True):
        if isinstance(prompt, MediaPrompt):
            if prompt not in first_feature:
                first_feature[prompt] = count
                count += len(prompt.features)
            rows.append(row + prompt.media_rows)
            index.append(first_feature[prompt] + torch.arange(len(prompt.features)))
        row += tree.num_tokens
    if not rows:
        return batch
    features = torch.cat([prompt.features for prompt in first_feature]).to(device)
    media = StreamMedia(features, torch.cat(rows), torch.cat(index))
    return dataclasses.replace(batch, media=media, scheme_ids=stream_positions(batch.groups, prompts, scheme))


class MediaProjector(torch.nn.Module):
    """Features of media tokens into the model's hidden space: patch embedding, GELU, projection.

    The first linear layer on the pixels of a patch is a convolution with the patch's size as stride; features that
    another encoder precomputed enter the same way. Small, and the same on every tensor-parallel rank.
    """

    def __init__(self, feature_size: int, hidden_size: int, init_std: float):
        super().__init__()
        self.norm = torch.nn.LayerNorm(feature_size)
        self.patch = torch.nn.Linear(feature_size, hidden_size)
        self.out = torch.nn.Linear(hidden_size, hidden_size)
        for layer in (self.patch, self.out):
            torch.nn.init.normal_(layer.weight, std=init_std)
            torch.nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[n, f] -> [n, h]."""
        features = features.to(self.patch.weight.dtype)
        return self.out(torch.nn.functional.gelu(self.patch(self.norm(features))))
