"""Folders of Hugging Face models to be looked into and spoilt, models read from them, and patches of a block."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_ext.blocks.delta import base_digest, place_weights, save_delta
from megatron_ext.blocks.places import ModelPlace
from megatron_ext.hf import hf_model_config, load_hf_weights, make_patch
from megatron_ext.models import build_gpt

INDEX = "model.safetensors.index.json"
BLOCK = 2  # that is changed


def build(folder, world, **changes):
    return build_gpt(hf_model_config(folder, **{"precision": "32"} | changes), world)


def imported(folder, world, **changes):
    model = build(folder, world, **changes)
    load_hf_weights(folder, model)
    return model


def tensors(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(str(path)).items()}


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def file_of(folder, name) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def set_tensor(folder, name, tensor) -> None:
    """Replace one tensor, or add it to the file of the embedding."""
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"].setdefault(name, index["weight_map"]["model.embed_tokens.weight"])
    save_file(
        load_file(str(folder / file)) | {name: tensor.contiguous()}, str(folder / file), metadata={"format": "pt"}
    )
    (folder / INDEX).write_text(json.dumps(index))


def change_block(model, rng, block=BLOCK) -> None:
    with torch.no_grad():
        for parameter in model.decoder.layers[block].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng).to(parameter.dtype))


def made_patch(folder, world, tmp_path) -> Path:
    model = imported(folder, world)
    base = base_digest(place_weights(model, [ModelPlace(BLOCK)]))
    change_block(model, torch.Generator().manual_seed(1))
    save_delta(tmp_path / "delta", model, [ModelPlace(BLOCK)], base)
    assert make_patch(tmp_path / "delta", folder, tmp_path / "patch") == (ModelPlace(BLOCK),)
    return tmp_path / "patch"
