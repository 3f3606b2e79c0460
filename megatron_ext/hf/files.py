"""Safetensors folders: what is in them by their headers alone, and files of which each tensor has its place beforehand.

The format is 8 bytes with the length of a JSON header, the header, and the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). The library checks what is read; it can neither write a file chunk by chunk nor
read into memory that is there, so `plan_files` and tensors.py do, and tests check them with the library.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from megatron_ext.errors import AlreadyExistsError, UserError
from megatron_ext.hf.raw import read_json
from megatron_ext.hf.spelling import common_name

__all__ = [
    "CODES", "DTYPES", "INDEX_FILE", "OTHER_FILES", "SINGLE_FILE", "TOKENIZER_FILES", "Slot", "Stored", "check_room",
    "check_target", "companions", "copy_files", "create_files", "described", "hf_weights_digest", "opened", "plan_files",
    "read_headers", "read_slots",
]  # fmt: skip

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READERS, SAMPLES, SAMPLE_BYTES = 16, 4, 1024
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What holds weights of fewer bits.
CODES = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
# What a language model calls its body, and what stands in one.
BODY, BODY_PARTS = "model.", ("embed_tokens", "layers", "norm")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# What a copy with other weights leaves out: code, pickles, and weights in files that are not read.
NOT_ALONG = (
    "*.py", *PICKLED, "*.safetensors", "*.index.json", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data", "*.npz",
    "*.tflite", "*.ot",
)  # fmt: skip
# Beside the weights; no code.
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
OTHER_FILES = ("generation_config.json", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: the format's name of its type, its shape, its first byte, and its name there.

    Attributes:
        scales, block: where it has fewer bits than a number, what the numbers of each block (rows, columns) are multiplied by.
        turned: outputs come before inputs in it, which the tensor of this name has the other way round.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    name: str
    scales: Stored | None = None
    block: tuple[int, int] | None = None
    turned: bool = False


@dataclass(frozen=True)
class Slot:
    """A tensor's bytes in a file of a folder: the first, and how many; its shape, and its type (None: no plain number)."""

    file: str
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file, mapped into memory while inside.

    Raises:
        UserError: it is missing, cut off, longer than its header says, or its header is damaged. Flipped bits of the
            tensors themselves cannot be seen: the format has no checksum.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; fetch the model again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:120]}); fetch it again") from error


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder, from headers alone, by its name in a language model: a body that was saved by itself
    (AutoModel) has no `model.` before its names.

    An index says which files there are; what is in them, they say themselves, as in transformers.

    Raises:
        UserError: no safetensors, a file missing or damaged, or a tensor that is there twice.
    """
    found: dict[str, Stored] = {}
    for path in _weight_files(folder):
        with opened(path):
            here, begin = _header(path)
        for stored, entry in here.items():
            name = BODY + stored if stored.split(".")[0] in BODY_PARTS else common_name(stored)
            if name in found:
                raise UserError(
                    f"{folder} holds {name} twice, in {found[name].file.name} and in {path.name}; fetch the model again"
                )
            start = begin + entry["data_offsets"][0]
            found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), start, stored)
    return found


def hf_weights_digest(folder: str | Path) -> str:
    """XXH3 of the names, types and shapes of all tensors of a model folder and of samples of their bytes: the first, the last and
    two between them. Which file a tensor is in does not matter.

    Raises:
        UserError: see `read_headers`.
    """
    with ThreadPoolExecutor(READERS) as pool:
        samples = pool.map(_samples, *zip(*sorted(read_headers(Path(folder)).items()), strict=True))
        return xxhash.xxh3_64_hexdigest(b"".join(samples))


def _samples(name: str, tensor: Stored) -> bytes:
    kind = (DTYPES | CODES).get(tensor.dtype)
    size = 0 if kind is None else math.prod(tensor.shape) * kind.itemsize
    found = [json.dumps([name, tensor.dtype, tensor.shape]).encode()]
    with open(tensor.file, "rb", buffering=0) as file:
        for i in range(SAMPLES):
            file.seek(tensor.start + max(size - SAMPLE_BYTES, 0) * i // (SAMPLES - 1))
            found.append(file.read(min(size, SAMPLE_BYTES)))
    return b"".join(found)


def _weight_files(folder: Path) -> list[Path]:
    """Safetensors files, by the index where there is one. The single file comes first, as in transformers."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{folder} has its weights in {pickled[0]} only, a pickle, which can run code and is never loaded here; "
                "take the model's safetensors, or convert it with transformers' save_pretrained where you trust it"
            )
        raise UserError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; name the folder of a Hugging Face model")
    places = read_json(folder / INDEX_FILE).get("weight_map")
    files: dict[Path, None] = {}
    for file in places.values() if isinstance(places, dict) else ():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{folder / INDEX_FILE}: {file!r} is no file name; fetch it again")
        files[folder / file] = None
    if not files:
        raise UserError(f"{folder / INDEX_FILE} is damaged: it has no weight_map; fetch it again")
    return list(files)


def read_slots(path: Path) -> dict[str, Slot]:
    """Where the tensors of a file that `opened` takes have their bytes."""
    header, begin = _header(path)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found[name] = Slot(path.name, begin + start, end - start, tuple(entry["shape"]), DTYPES.get(entry["dtype"]))
    return found


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """Tensors by name, and where their bytes begin, of a file that the library has found sound."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def plan_files(
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    largest: int,
    single: str = SINGLE_FILE,
    metadata: Mapping[str, str] = MappingProxyType({}),
    exact: Container[str] = (),
) -> tuple[dict[str, Slot], dict[str, bytes]]:
    """Spread tensors over files of at most `largest` bytes of them, in order; a larger tensor has a file of its own.

    Args:
        single: the file's name where there is one.
        metadata: that every file has.
        exact: names of tensors in fp32, whatever the type of the others.

    Returns:
        The place of each tensor, and the beginning of each file, up to its first tensor.
    """
    dtypes = {name: torch.float32 if name in exact and dtype.itemsize < 4 else dtype for name in shapes}
    sizes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items()}
    parts: list[list[str]] = [[]]
    for name, size in sizes.items():
        if parts[-1] and sum(sizes[n] for n in parts[-1]) + size > largest:
            parts.append([])
        parts[-1].append(name)
    slots, beginnings = {}, {}
    codes = {kind: name for name, kind in DTYPES.items()}
    for number, names in enumerate(parts, 1):
        file = single if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        header: dict = {"__metadata__": {"format": "pt", **metadata}}
        end = 0
        for name in names:
            start, end = end, end + sizes[name]
            header[name] = {"dtype": codes[dtypes[name]], "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        beginnings[file] = len(text).to_bytes(8, "little") + text
        for name in names:
            start = len(beginnings[file]) + header[name]["data_offsets"][0]
            slots[name] = Slot(file, start, sizes[name], tuple(shapes[name]), dtypes[name])
    return slots, beginnings


def check_room(folder: Path, size: int) -> None:
    """
    Raises:
        UserError: the disk has no room for so many bytes and a few files beside them.
    """
    free, needed = shutil.disk_usage(folder).free, size + (1 << 20)
    if free < needed:
        raise UserError(
            f"no room for {folder}: it needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; free some"
        )


def described(error: Exception, folder: Path) -> Exception:
    """The error of the system itself says neither what was being written nor always where."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"cannot write {folder}: {error.strerror}{f' ({error.filename})' if error.filename else ''}")
    return error


def create_files(folder: Path, slots: dict[str, Slot], beginnings: dict[str, bytes]) -> None:
    """The files in their full length, and the index where there are several.

    Raises:
        UserError: the disk has no room for them.
    """
    total = sum(slot.size for slot in slots.values())
    check_room(folder, total + sum(map(len, beginnings.values())))
    for name, beginning in beginnings.items():
        with open(folder / name, "wb") as file:
            file.write(beginning)
            file.truncate(len(beginning) + sum(slot.size for slot in slots.values() if slot.file == name))
    if len(beginnings) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: slot.file for name, slot in slots.items()}}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def check_target(folder: Path) -> None:
    """What is written, a folder or a file, gets its name by a rename when it is whole, which nothing may stand in the way
    of: an empty folder may be a mount, and a link would be replaced, not followed.

    Raises:
        AlreadyExistsError: anything is there, if only an empty folder or a link to nothing.
    """
    if os.path.lexists(folder):
        raise AlreadyExistsError(f"{folder} exists already; nothing is ever overwritten, choose another name")


def companions(source: Path, patterns: tuple[str, ...] = ("**/*",)) -> list[Path]:
    """What lies beside the weights, within the source: files of these names, but no code, no weights that are not read,
    and nothing in hidden folders (.git, .cache). Links to files count as files."""
    found = (path.relative_to(source) for pattern in patterns for path in source.glob(pattern) if path.is_file())
    return sorted(
        {
            path
            for path in found
            if not any(path.match(pattern) for pattern in NOT_ALONG)
            and not any(part.startswith(".") for part in path.parent.parts)
        }
    )


def copy_files(source: Path, folder: Path, files: Iterable[Path]) -> None:
    """Files within the source to the same places within the folder; links are followed."""
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)
