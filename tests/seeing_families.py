"""Families of models that see, each as a row: a small random one of transformers, prompts for it, and what that model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_ext.models.media import MediaPrompt
from megatron_ext.vision import Pixels
from tests.vision_cases import (
    IMAGE,
    NEXT,
    ONEVISION,
    QWEN_VIDEO,
    TOWERS,
    CutImage,
    cut_image,
    image_prompt,
    make_llava,
    make_next,
    make_onevision,
    make_qwen,
    next_image,
    onevision_prompt,
    onevision_tower,
    patches,
    pictures,
    qwen_prompt,
    qwen_tower,
    tiles,
)

__all__ = ["SEEING", "SeeingFamily", "qwen_arguments"]


@dataclass(frozen=True)
class SeeingFamily:
    """
    Attributes:
        make: (folder, rng) -> transformers' model, whose folder it is.
        prompt: (rng, texts' lengths and media) -> a prompt.
        media: rng -> media of several kinds and sizes.
        arguments: (prompt, response, type of pixels) -> what transformers' model takes.
        placeholders: tokens that are no text.
        eyes: fields of `VisionConfig` of such a model.
        floor: of a gradient's error, over the largest gradient: a tower that turns and norms in fp32 whatever it is given.
    """

    make: Callable[[Path, torch.Generator], torch.nn.Module]
    prompt: Callable[[torch.Generator, list[int | Pixels]], MediaPrompt]
    media: Callable[[torch.Generator], list[Pixels]]
    arguments: Callable[[MediaPrompt, Sequence[int], torch.dtype], dict[str, Any]]
    placeholders: frozenset[int]
    eyes: dict[str, Any]
    floor: float = 0.0

    def mixed(self, rng: torch.Generator) -> MediaPrompt:
        """All media, between texts."""
        parts: list[int | Pixels] = [3]
        for medium in self.media(rng):
            parts += [medium, int(torch.randint(1, 5, (), generator=rng))]
        return self.prompt(rng, parts)


def llava_arguments(prompt: MediaPrompt, response: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    frames = torch.cat([pixels.values for pixels in prompt.content]).to(dtype)
    return {"input_ids": torch.tensor([[*prompt.tokens, *response]]), "pixel_values": frames}


def onevision_arguments(prompt: MediaPrompt, response: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Of images as if there were several, each one tile, or of one that is cut into tiles; of one video."""
    given: dict[str, Any] = {"input_ids": torch.tensor([[*prompt.tokens, *response]])}
    if images := [m for m in prompt.content if not m.video]:
        sizes = torch.tensor([m.size if isinstance(m, CutImage) else m.values.shape[2:] for m in images])
        given |= {"pixel_values": torch.cat([m.values for m in images]).to(dtype), "image_sizes": sizes}
        given["batch_num_images"] = torch.tensor([1 if isinstance(images[0], CutImage) else max(2, len(images))])
    if videos := [m.values for m in prompt.content if m.video]:
        given["pixel_values_videos"] = torch.stack(videos).to(dtype)
    return given


def next_arguments(prompt: MediaPrompt, response: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Of any number of images, each cut into tiles."""
    return llava_arguments(prompt, response, dtype) | {"image_sizes": torch.tensor([m.size for m in prompt.content])}


def qwen_arguments(
    prompt: MediaPrompt, response: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    tokens = torch.tensor([[*prompt.tokens, *response]])
    given = {"input_ids": tokens, "mm_token_type_ids": (tokens == IMAGE).int() + 2 * (tokens == QWEN_VIDEO).int()}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels := [m for m in prompt.content if (m.patches[0] == 1) == (kind == "image")]:
            given[name] = torch.cat([m.values for m in pixels]).to(dtype)
            given[f"{kind}_grid_thw"] = torch.tensor([m.patches for m in pixels])
    return given


def _llava(kind: str, **changes: Any) -> SeeingFamily:
    return SeeingFamily(
        lambda folder, rng: make_llava(folder, kind, rng, **changes),
        image_prompt,
        lambda rng: [pictures(rng, count) for count in (1, 2)],
        llava_arguments,
        frozenset({IMAGE}),
        {"tower_config": TOWERS[kind]},
    )


def _next(kind: str, **changes: Any) -> SeeingFamily:
    return SeeingFamily(
        lambda folder, rng: make_next(folder, kind, rng, **changes),
        onevision_prompt,
        lambda rng: [next_image(rng), next_image(rng)],
        next_arguments,
        frozenset({IMAGE}),
        {"tower_config": TOWERS[kind], "connector": "onevision", **NEXT},
    )


def _onevision(media: Callable[[torch.Generator], list[Pixels]]) -> SeeingFamily:
    return SeeingFamily(
        make_onevision,
        onevision_prompt,
        media,
        onevision_arguments,
        frozenset({IMAGE, QWEN_VIDEO}),
        {"tower_config": onevision_tower(), "connector": "onevision", **ONEVISION},
    )


def _qwen(name: str, **changes: Any) -> SeeingFamily:
    grids = ((1, 4, 6), (3, 6, 4), (1, 8, 8), (2, 2, 2))
    return SeeingFamily(
        lambda folder, rng: make_qwen(folder, name, rng, **changes),
        partial(qwen_prompt, family=name),
        lambda rng: [patches(rng, *grid) for grid in grids],
        qwen_arguments,
        frozenset({IMAGE, QWEN_VIDEO}),
        {"tower_config": qwen_tower(name)},
        floor=1e-7,
    )


SEEING = {
    "llava, clip": _llava("clip", tie_word_embeddings=False),
    "llava, siglip": _llava("siglip", vision_feature_layer=[1, -1]),
    "llava_next, clip": _next("clip", tie_word_embeddings=False),
    "llava_next, siglip": _next("siglip", vision_feature_layer=[1, -1]),
    "llava_onevision": _onevision(lambda rng: [tiles(rng, 1), tiles(rng, 3, video=True), tiles(rng, 1)]),
    "llava_onevision, tiles": _onevision(lambda rng: [cut_image(rng), tiles(rng, 2, video=True)]),
    "qwen2_vl": _qwen("qwen2_vl", tie_word_embeddings=True),
    "qwen2_5_vl": _qwen("qwen2_5_vl", tie_word_embeddings=False),
    "qwen3_vl": _qwen("qwen3_vl", tie_word_embeddings=True),
}
