"""One fine-tuned block as a small file in Hugging Face's names, and a Hugging Face folder with that block put in.

The patch is a safetensors file of whole tensors in the types of the folder it belongs to. Its metadata names the block and
carries a digest of the tensors that it replaces, so that it is not put on another model, and one of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.blocks.blocks import block_prefix
from megatron_ext.blocks.delta import block_digest, content_digest, read_delta
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
from megatron_ext.hf.mapping import OURS, entries
from megatron_ext.hf.tensors import TensorWriter, is_finite

__all__ = ["apply_patch", "make_patch"]

PATCH_FORMAT = "megatron_ext.hf_patch.1"


def make_patch(delta: str | Path, folder: str | Path, path: str | Path) -> int:
    """Turn a block's delta (`megatron_ext.blocks.delta`) into a patch of the Hugging Face folder that the model was
    imported from. One process; no model is built. Returns the block's number.

    Raises:
        FileExistsError: the patch's file exists.
        UserError: no delta, or one of another model than the folder's.
        UserError: the disk is full.
        Nothing is left behind then.
    """
    delta, folder, path = Path(delta), Path(folder), Path(path)
    check_target(path)
    config = hf_model_config(folder)
    headers = checked_headers(folder, config)
    description, new = read_delta(delta)
    block, known = description["block"], entries(config)
    if description["num_layers"] != config.num_layers:
        raise UserError(
            f"the delta {delta} belongs to another model than {folder}: of {description['num_layers']} blocks, not "
            f"{config.num_layers}"
        )
    prefix = block_prefix(block)
    patch: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for name, tensor in new.items():
        key = name.removeprefix(prefix)
        entry = known.get(OURS + key)
        if entry is None or not name.startswith(prefix):
            raise UserError(f"the delta {delta} belongs to another model than {folder}: {name} has no place there")
        old = torch.empty_like(tensor)
        shapes = entry.tensors(block, config)
        for hf_slice in entry.slices(block, config, 0):
            if entry.parameter_shape(hf_slice) != tensor.shape:
                raise UserError(
                    f"the delta {delta} belongs to another model than {folder}: {name} is {tuple(tensor.shape)} there, "
                    f"{entry.parameter_shape(hf_slice)} here"
                )
            value = tensor.view(hf_slice.view)[hf_slice.place].reshape(shapes[hf_slice.name])
            patch[hf_slice.name] = value.to(DTYPES[headers[hf_slice.name].dtype]).contiguous()
            if not is_finite(patch[hf_slice.name]):
                raise UserError(
                    f"the delta {delta} has a number in {name} that is not finite in {patch[hf_slice.name].dtype}, the type of "
                    f"{folder}'s tensors; take the model in a type with a larger range"
                )
        read_parameter(old, entry, block, config, 0, headers)
        base[key] = old
    if description["base"] != block_digest(base):
        raise UserError(
            f"the delta {delta} was made from other weights than {folder}'s; name the folder that its checkpoint was "
            "imported from"
        )
    about = {"format": PATCH_FORMAT, "block": block, "base": _digest(patch, headers)}
    about["content"] = content_digest(about, patch)
    try:
        with whole(path) as unfinished:
            save_file(patch, str(unfinished), metadata={"format": "pt", "patch": json.dumps(about)})
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot write {path}: {' '.join(str(error).split())}") from error
    return block


def apply_patch(base: str | Path, patch: str | Path, folder: str | Path) -> int:
    """Copy a Hugging Face folder with one block of a patch in it; everything else stays byte for byte. Left out are code,
    pickles, weights in files that transformers would not read, and hidden folders. Returns the block's number.

    Raises:
        FileExistsError: `folder` is there, if only empty.
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
    return description["block"]


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
            raise UserError(f"{path} is no patch of one block: its format is {found!r}, not {PATCH_FORMAT!r}")
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
    return block_digest(old)
