"""Vision towers and connectors in Hugging Face folders: their tensors, their shape, and how pictures are made for them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.hf.raw import read_json
from megatron_ext.hf.spelling import PROJECTOR, TOWER
from megatron_ext.vision import VisionConfig
from megatron_ext.vision.connectors import build_connector
from megatron_ext.vision.kinds import build_tower, read_tower_config

__all__ = ["PREPROCESSING_FILES", "SAID_IN", "eye_tensors", "read_preprocessing", "read_tower"]

PROCESSOR = "processor_config.json"
# Keys of `VisionConfig`: the file that says it, and of PROCESSOR the key that says it where it has one, as transformers has it.
SAID_IN = {
    "preprocessing": ("preprocessor_config.json", "image_processor"),
    "video_preprocessing": ("video_preprocessor_config.json", "video_processor"),
}
PREPROCESSING_FILES = (*(file for file, _ in SAID_IN.values()), PROCESSOR)


def eye_tensors(
    vision: VisionConfig | Mapping[str, Any] | None, hidden_size: int
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(our name, name here, shape) of all parameters of the tower and its connector; none where no family has such eyes."""
    if isinstance(vision, Mapping):
        vision = VisionConfig(**vision)
    if vision is None or not vision.has_tower or vision.connector == "norm_mlp":
        return []
    return list(_eye_tensors(json.dumps(dataclasses.asdict(vision)), hidden_size))


@functools.lru_cache(maxsize=8)
def _eye_tensors(said: str, hidden_size: int) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    vision, device = VisionConfig(**json.loads(said)), torch.device("meta")
    tower = build_tower(vision.tower_config, device)
    with device:
        connector = build_connector(vision, hidden_size, 0.02)
    within = TOWER if vision.kind.merges else PROJECTOR  # a merger is its tower's
    parts = (("vision_tower.model.", TOWER, tower), ("media_projector.", within, connector))
    return tuple(
        (ours + name, theirs + name, tuple(parameter.shape))
        for ours, theirs, module in parts
        for name, parameter in module.named_parameters()
    )


def read_preprocessing(folder: Path) -> dict[str, dict[str, Any] | None]:
    """How pictures and videos' frames are made for a folder's tower, by keys of `VisionConfig`; None: it does not say."""
    found = {}
    for name, (file, key) in SAID_IN.items():
        said = read_json(folder / PROCESSOR).get(key) if (folder / PROCESSOR).is_file() else None
        if not isinstance(said, dict):
            said = read_json(folder / file) if (folder / file).is_file() else None
        found[name] = said
    return found


def read_tower(folder: str | Path) -> dict[str, Any]:
    """`tower_config`, `preprocessing` and `video_preprocessing` of `VisionConfig`, of a folder with a vision model or a model
    that has one.

    Raises:
        UserError: no config.json, or no tower in it that is read here.
    """
    folder = Path(folder).expanduser()
    raw = read_json(folder / "config.json")
    where = f"model.vision.tower={folder}"
    if isinstance(within := raw.get("vision_config"), dict):
        within = dict(within)
        if within.get("model_type", raw.get("model_type")) in ("clip", "siglip"):
            within["model_type"] = f"{raw['model_type']}_vision_model"
        raw = within
    return {"tower_config": read_tower_config(raw, where)} | read_preprocessing(folder)
