"""Prompts with media, and responses to them, to test with."""

from __future__ import annotations

import torch

from megatron_ext.models.media import MediaPrompt
from megatron_ext.rotary import Image, Text, Video
from tests.layouts import randn

__all__ = ["FEATURES", "cases"]

FEATURES, PLACEHOLDER = 12, 60


def media_prompt(rng, items) -> MediaPrompt:
    """Random text around random features."""
    tokens = []
    for item in items:
        text = torch.randint(PLACEHOLDER, (item.length,), generator=rng).tolist()
        tokens += [PLACEHOLDER] * item.length if isinstance(item, Video) else text
    media = [item for item in items if isinstance(item, Video)]
    return MediaPrompt.of(tokens, PLACEHOLDER, media, randn(rng, sum(m.length for m in media), FEATURES))


def cases(rng):
    """(prompts, their responses): media first, in the middle and last, several beside each other, a text prompt."""
    prompts = [
        media_prompt(rng, [Text(3), Video(2, 2, 3), Text(2)]),
        torch.randint(PLACEHOLDER, (4,), generator=rng).tolist(),
        media_prompt(rng, [Image(2, 2), Video(1, 1, 2), Text(1), Image(3, 1)]),
    ]
    responses = [
        [torch.randint(PLACEHOLDER, (n,), generator=rng).tolist() for n in ns] for ns in ([3, 5], [2, 2], [4, 1, 2])
    ]
    return prompts, responses
