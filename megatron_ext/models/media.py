"""Prompts with images and videos: which tokens stand for them, where those stand, and what the model sees instead.

A medium's tokens are placeholders in the prompt. Their rows get the medium's projected features in place of token
embeddings, and positions by the model's scheme; what follows a prompt starts at the prompt's next index, which is not
its number of tokens.

Shape legend: t rows of the stream, n media tokens of its prompts, f features of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.grouping import PackedTokens, PrefixGroups, StreamMedia, pack
from megatron_ext.rotary import Item, Scheme, Text, Video, find_scheme, layout
from megatron_ext.vision import Pixels

__all__ = ["MediaPrompt", "next_position", "pack_prompts", "stream_positions"]


@dataclass(frozen=True, eq=False)
class MediaPrompt:
    """A prompt with media. Build it with `of`.

    Attributes:
        tokens: token ids, placeholders included.
        items: texts and media in the order of the tokens.
        content: of all media in the order of the tokens, features [n, f], or what the model's tower is shown of each.
    """

    tokens: list[int]
    items: tuple[Item, ...]
    content: Tensor | tuple[Pixels, ...]

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        placeholder: int | Collection[int],
        media: Sequence[Video],
        content: Tensor | Sequence[Pixels],
    ) -> MediaPrompt:
        """Find the media among the tokens.

        Args:
            tokens: one `placeholder`, or one of several, for every token of every medium, media in order.
            content: features [n, f], or pixels of each medium.

        Raises:
            UserError: a number of placeholders, features or pictures that does not fit the media.
        """
        expected = sum(m.length for m in media)
        grids = ", ".join(f"{m.t} x {m.h} x {m.w}" for m in media) or "none"
        known = {placeholder} if isinstance(placeholder, int) else {*placeholder}
        found = sum(token in known for token in tokens)
        if found != expected:
            raise UserError(
                f"the prompt has {found} placeholder tokens, its media ({grids}) have {expected}: write one for each token "
                "of each grid"
            )
        if isinstance(content, Tensor):
            if content.dim() != 2 or len(content) != expected:
                raise UserError(f"media ({grids}) have {expected} tokens, features are {tuple(content.shape)}")
        else:
            content = tuple(content)
            if len(content) > len(media):  # a video may stand in several places, a frame in each
                raise UserError(f"the prompt has {len(media)} media ({grids}) and pictures of {len(content)}")
        items: list[Item] = []
        row, waiting = 0, list(media)
        while row < len(tokens):
            if tokens[row] in known:
                medium = waiting.pop(0)
                if any(token != tokens[row] for token in tokens[row : row + medium.length]):
                    raise UserError(f"text stands among the {medium.length} placeholders of {medium}")
                items.append(medium)
            else:
                end = row
                while end < len(tokens) and tokens[end] not in known:
                    end += 1
                items.append(Text(end - row))
            row += items[-1].length
        return cls(list(tokens), tuple(items), content)

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


def next_position(prompt: Prompt, scheme: str | Scheme) -> float:
    """Where what follows a prompt starts."""
    return layout(prompt.items, scheme).next_index if isinstance(prompt, MediaPrompt) else len(prompt)


def stream_positions(groups: PrefixGroups, prompts: Sequence[Prompt], scheme: str | Scheme) -> Tensor:
    """[axes, t] of the scheme's type: positions of a stream whose groups have these prompts.

    Every continuation starts at its prompt's next index, on every axis, however deep it stands in the tree.
    """
    scheme = find_scheme(scheme) if isinstance(scheme, str) else scheme
    device = groups.position_ids.device
    ids = groups.position_ids.to(scheme.dtype).expand(scheme.axes, -1).clone()  # [axes, t]: right for text
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
            here = prompt.media_rows
            if prompt not in first_feature:
                first_feature[prompt] = count
                count += len(here)
            rows.append(row + here)
            index.append(first_feature[prompt] + torch.arange(len(here)))
        row += tree.num_tokens
    if not rows:
        return batch
    media = StreamMedia(_content(list(first_feature), device), torch.cat(rows), torch.cat(index))
    return dataclasses.replace(batch, media=media, scheme_ids=stream_positions(batch.groups, prompts, scheme))


def _content(prompts: Sequence[MediaPrompt], device: torch.device | str) -> Tensor | tuple[Pixels, ...]:
    kinds = {isinstance(prompt.content, Tensor) for prompt in prompts}
    if len(kinds) > 1:
        raise UserError(
            "some prompts have features and others pictures: a model sees one kind; take the same for all rows"
        )
    if True in kinds:
        return torch.cat([prompt.content for prompt in prompts]).to(device)
    return tuple(pixels for prompt in prompts for pixels in prompt.content)
