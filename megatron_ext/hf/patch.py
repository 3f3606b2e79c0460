"""Fine-tuned places, such as one block, as a small file in Hugging Face's names, and a Hugging Face folder with them put in.

The patch is a safetensors file of whole tensors in the types of the folder it belongs to; of heads, too, of which a delta has
their numbers alone. Its metadata names the places and carries a digest of the tensors that it replaces, so that it is not put on
another model, and one of its own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.blocks.blocks import block_prefix
from megatron_ext.blocks.delta import base_digest, content_digest, read_delta, tensor_digest
from megatron_ext.blocks.places import ModelPlace, check_places, head_index, parse_places
from megatron_ext.errors import UserError
from megatron_ext.files import whole
from megatron_ext.hf.config import hf_model_config
from megatron_ext.hf.files import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    check_room,
    check_target,
    companions,
    copy_files,
    described,
    opened,
    read_headers,
    read_slots,
)
from megatron_ext.hf.load import checked_headers, read_parameter
from megatron_ext.hf.mapping import OURS, entries, find_entry
from megatron_ext.hf.tensors import TensorWriter, is_finite

__all__ = ["apply_patch", "make_patch"]

PATCH_FORMAT = "megatron_ext.hf_patch.2"


def make_patch(delta: str | Path, folder: str | Path, path: str | Path) -> tuple[ModelPlace, ...]:
    """Turn a delta (`megatron_ext.blocks.delta`) into a patch of the Hugging Face folder that the model was imported from. One
    process; no model is built. Returns the places that it is of.

    Raises:
        AlreadyExistsError: the patch's file exists.
        UserError: no delta, or one of another model than the folder's.
        UserError: the disk is full.
        Nothing is left behind then.
    """
    delta, folder, path = Path(delta), Path(folder), Path(path)
    check_target(path)
    config = hf_model_config(folder)
    headers = checked_headers(folder, config)
    description, new = read_delta(delta)
    other = f"the delta {delta} belongs to another model than {folder}"
    if description["num_layers"] != config.num_layers:
        raise UserError(f"{other}: of {description['num_layers']} blocks, not {config.num_layers}")
    places, known = parse_places(description["places"]), entries(config)
    check_places(places, config.num_layers, config.num_attention_heads)
    # Where in whole tensors of heads a delta's numbers are.
    inside = {
        block_prefix(place.block) + name: where
        for place in places
        if place.heads
        for name, where in head_index(config, place.heads).items()
    }
    patch: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for name, tensor in new.items():
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        block = int(found[1]) if found else -1
        entry = find_entry(known, OURS + found[2]) if found else None
        if entry is None or block not in {place.block for place in places}:
            raise UserError(f"{other}: {name} has no place there")
        whole_shape = list(tensor.shape)
        if name in inside:
            dim, numbers = inside[name]
            whole_shape[dim] = entry.parameter_shape(next(iter(entry.slices(block, config, 0))))[dim]
        old = torch.empty(whole_shape, dtype=tensor.dtype)
        for hf_slice in entry.slices(block, config, 0):
            if headers[hf_slice.name].scales is not None or hf_slice.order is not None:
                raise UserError(
                    f"{folder} has {hf_slice.name} quantised, or with all experts in one, which no patch replaces; "
                    "tools/convert_hf.py export of the run's checkpoint has the block"
                )
            if entry.parameter_shape(hf_slice) != old.shape:
                raise UserError(f"{other}: {name} is {tuple(old.shape)} there, {entry.parameter_shape(hf_slice)} here")
        read_parameter(old, entry, block, config, 0, headers)
        base[name] = old
        if name in inside:
            if tensor.size(dim) != len(numbers):
                raise UserError(
                    f"{other}: {name} has {tensor.size(dim)} of the heads' numbers there, {len(numbers)} here"
                )
            base[name] = old.index_select(dim, numbers)
            tensor = old.index_copy(dim, numbers, tensor)
        shapes = entry.tensors(block, config)
        for hf_slice in entry.slices(block, config, 0):
            value = tensor.view(hf_slice.view)[hf_slice.place].reshape(shapes[hf_slice.name])
            patch[hf_slice.name] = value.to(DTYPES[headers[hf_slice.name].dtype]).contiguous()
            if not is_finite(patch[hf_slice.name]):
                raise UserError(
                    f"the delta {delta} has a number in {name} that is not finite in {patch[hf_slice.name].dtype}, the type of "
                    f"{folder}'s tensors; take the model in a type with a larger range"
                )
    if description["base"] != base_digest(base):
        raise UserError(
            f"the delta {delta} was made from other weights than {folder}'s; name the folder that its checkpoint was "
            "imported from"
        )
    about = {"format": PATCH_FORMAT, "places": description["places"], "base": _digest(patch, headers)}
    about["content"] = content_digest(about, patch)
    try:
        with whole(path) as unfinished:
            save_file(patch, str(unfinished), metadata={"format": "pt", "patch": json.dumps(about)})
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot write {path}: {' '.join(str(error).split())}") from error
    return places


def apply_patch(base: str | Path, patch: str | Path, folder: str | Path) -> tuple[ModelPlace, ...]:
    """Copy a Hugging Face folder with a patch in it; everything else stays byte for byte. Left out are code, pickles, weights in
    files that transformers would not read, and hidden folders. Returns the places that it is of.

    Raises:
        AlreadyExistsError: `folder` is there, if only empty.
        UserError: no patch, or one of another model than `base`.
        UserError: the disk is full.
        Nothing is left behind then.
    """
    base, patch, folder = Path(base), Path(patch), Path(folder)
    check_target(folder)
    headers = read_headers(base)
    files = {stored.file for stored in headers.values()}
    along = [*companions(base), *(Path(file.name) for file in files)]
    if (base / INDEX_FILE).is_file() and files != {base / SINGLE_FILE}:  # beside the single file it is not read
        along.append(Path(INDEX_FILE))
    description, new = _read(patch)
    for name, tensor in new.items():
        stored = headers.get(name)
        if stored is None or (stored.shape, DTYPES.get(stored.dtype)) != (tuple(tensor.shape), tensor.dtype):
            raise UserError(f"the patch {patch} belongs to another model than {base}: {name} does not fit")
    if _digest(new, headers) != description["base"]:
        raise UserError(f"the patch {patch} was made for other weights than {base}'s; name the folder it was made for")
    try:
        with whole(folder) as unfinished:
            unfinished.mkdir(parents=True)
            check_room(unfinished, sum((base / path).stat().st_size for path in along))
            copy_files(base, unfinished, along)
            slots = {name: read_slots(headers[name].file)[headers[name].name] for name in new}
            writer = TensorWriter(unfinished, slots)
            for name, tensor in new.items():
                writer.write(name, tensor)
            if error := writer.close():
                raise error
    except (OSError, UserError) as error:
        raise described(error, folder) from error
    return parse_places(description["places"])


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(description, tensors) of a patch."""
    if not path.is_file():
        raise UserError(f"the patch {path} does not exist")
    with opened(path) as file:
        metadata = file.metadata() or {}
        try:
            description = json.loads(metadata["patch"])
            found = description["format"]
        except (KeyError, ValueError, TypeError):
            found = None
        if found != PATCH_FORMAT:
            raise UserError(f"{path} is no patch of ours: its format is {found!r}, not {PATCH_FORMAT!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if (content_digest(description, tensors), "pt") != (description.get("content"), metadata.get("format")):
        raise UserError(f"the patch {path} is damaged (its checksum differs): make it again")
    return description, tensors


def _digest(tensors: dict[str, Tensor], headers) -> str:
    """Of the folder's tensors of these names."""
    old = {}
    for name in tensors:
        with opened(headers[name].file) as file:
            old[name] = file.get_tensor(headers[name].name)
    return tensor_digest(old)
