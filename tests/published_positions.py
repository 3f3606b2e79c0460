"""Where transformers puts the tokens of texts, images and videos."""

from __future__ import annotations

import importlib
from types import MethodType, SimpleNamespace

import torch

from megatron_ext.rotary import Text, Video

MERGE = 2


def by_transformers(package: str, name: str, parts: list[tuple[Text | Video, int]], frames_apart: bool) -> torch.Tensor:
    """int64 [3, tokens].

    Args:
        package: of transformers.models.
        name: of its model.
        parts: with their kinds, 0 text, 1 image, 2 video.
        frames_apart: a video stands there as frames with text between.
    """
    model = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)
    vision = SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=2, temporal_merge_size=MERGE)
    stub = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    stub.get_vision_position_ids = MethodType(model.get_vision_position_ids, stub)
    kinds = torch.tensor([[kind for item, kind in parts for _ in range(item.length)]])
    merged = MERGE if package.startswith("ernie") else 1  # of two frames
    grids = {
        kind: [[x.t * (merged if kind == 2 else 1), x.h * MERGE, x.w * MERGE] for x, k in parts if k == kind]
        for kind in (1, 2)
    }
    more = {}
    if package == "qwen2_5_vl":
        steps = [item.seconds[1] if item.t > 1 else 1.0 for item, kind in parts if kind == 2]
        more["second_per_grid_ts"] = torch.tensor(steps)
    images, videos = (torch.tensor(grids[kind]) if grids[kind] else None for kind in (1, 2))
    return model.get_rope_index(stub, torch.zeros_like(kinds), kinds, images, videos, **more)[0][:, 0]
