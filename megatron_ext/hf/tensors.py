"""Slices of tensors between safetensors files and parameters, in chunks of a megabyte.

Reading and writing by position, not by mapping: a mapped file counts as the process's memory, and its type and layout are
not the parameter's. What is read or written is checked to be finite, which costs little in a chunk that is in the cache.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.hf.files import CODES, DTYPES, Slot, Stored
from megatron_ext.hf.quantised import decode, one_of_all, stored_width
from megatron_ext.runtime.progress import PROGRESS

__all__ = ["TensorWriter", "is_finite", "not_finite", "read_of_all", "read_slice"]

# Larger ones leave the cache before they are checked, and ext4 spends ten times as long on a write of 4 MiB as on four.
CHUNK_BYTES = 1 << 20


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity, in one pass and without a mask."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # NaN if any is
    return math.isfinite(low) and math.isfinite(high)


def not_finite(name: str, dtype: torch.dtype) -> UserError:
    """Why a tensor of a model is not given away."""
    return UserError(
        f"{name} holds a number that is not finite in {dtype}: the model is broken, or needs a type with a larger range"
    )


def read_slice(name: str, stored: Stored, index: tuple[slice, ...], target: Tensor) -> None:
    """Fill `target`, of any float type and device, with a slice of a tensor; one of fewer bits is multiplied by its scales.

    Args:
        index: the slice: its rows, and in a matrix perhaps its columns.
        target: in the slice's shape, or with its rows in equal groups [groups, rows of a group, ...].

    Raises:
        UserError: the file ends too early, or a number is not finite (in the target's type).
    """
    dtype, rest = (DTYPES | CODES)[stored.dtype], stored.shape[1:]
    width = stored_width(stored)
    row = width * dtype.itemsize
    step = max(1, CHUNK_BYTES // row)
    columns = (slice(None), *index[1:])
    on_host = target.device.type == "cpu"
    direct = dtype == target.dtype and on_host and len(columns) == 1
    buffer, scales, first = None, None, index[0].start
    if stored.scales is not None:
        whole, code = stored.scales, (DTYPES | CODES)[stored.scales.dtype]
        scales = torch.empty(whole.shape, dtype=torch.float32 if code.is_floating_point else code)
        read_slice(whole.name, whole, (slice(0, whole.shape[0]),), scales)
    place = stored.start + index[0].start * row
    try:
        with open(stored.file, "rb", buffering=0) as file:
            for group in [target] if target.dim() == len(stored.shape) else target:
                for chunk in group.split(step):
                    if direct and chunk.is_contiguous():
                        _read(file.fileno(), chunk, place)
                    else:
                        if buffer is None:
                            buffer = torch.empty(step, *(rest if stored.scales is None else (width,)), dtype=dtype)
                        _read(file.fileno(), buffer[: len(chunk)], place)
                        read = buffer[: len(chunk)]
                        if scales is not None:
                            read = decode(read, scales, stored.block, first)
                        read = read[columns]
                        if not on_host:
                            read = read.to(target.dtype)
                        chunk.copy_(read)
                    # Of what goes to a GPU the host's copy is looked at: it would wait for each chunk to come back.
                    if not is_finite(chunk if on_host else read):
                        raise UserError(
                            f"{stored.file} is damaged: {name} holds a number that is not finite in {target.dtype}; fetch it "
                            "again"
                        )
                    place += len(chunk) * row
                    first += len(chunk)
    except OSError as error:
        raise UserError(f"cannot read {stored.file} ({error.strerror}); fetch it again") from error


def read_of_all(name: str, stored: Stored, index: tuple[slice, ...], target: Tensor) -> None:
    """Fill `target` with a part of one expert in a tensor [experts, inputs, outputs], or [experts, outputs]; all of the expert is
    in memory for a moment.

    Args:
        index: the expert, and the slice of what it has.
        target: in the slice's order, of whatever dimensions.
    """
    part = one_of_all(stored, index[0].start)
    read = torch.empty(part.shape, dtype=target.dtype)
    read_slice(name, part, (slice(0, part.shape[0]),), read)
    if stored.turned:
        read = read.t()
    target.copy_(read[index[1:]].reshape(target.shape))


def _read(file: int, chunk: Tensor, place: int) -> None:
    data, done = _bytes(chunk), 0
    while done < len(data):
        got = os.preadv(file, [data[done:]], place + done)
        if not got:
            raise OSError(None, "it ends too early")
        done += got


def _bytes(tensor: Tensor) -> memoryview:
    """Of a contiguous tensor on the host."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class TensorWriter:
    """Puts slices of tensors into their places in a folder's files, in those tensors' types. After an error it takes them and
    does nothing."""

    def __init__(self, folder: Path, slots: dict[str, Slot]):
        self.folder, self.slots = folder, slots
        self.error: Exception | None = None
        self._files: dict[str, int] = {}

    def write(self, name: str, data: Tensor, index: tuple[slice, ...] | None = None) -> None:
        """
        Args:
            data: of any float type, layout and device; with its rows perhaps in equal groups, as `read_slice` has them.
            index: its rows in the tensor, and in a matrix perhaps its columns; before them, in a tensor of all experts, one of
                these. None: all of it.
        """
        if self.error is not None or not data.numel():
            return
        PROGRESS.made()
        slot = self.slots[name]
        shape, start, size = slot.shape or (1,), slot.start, slot.size
        if index is None:
            index, data = (slice(0, shape[0]),), data.reshape(shape)
        if len(index) > 2:  # of one expert's matrix
            size //= shape[0]
            start += index[0].start * size
            (_, *shape), (_, *index), data = shape, index, data[0]
        row = size // shape[0]
        step = max(1, CHUNK_BYTES // row)
        place = start + index[0].start * row
        try:
            if slot.file not in self._files:
                self._files[slot.file] = os.open(self.folder / slot.file, os.O_WRONLY)
            for group in [data] if data.dim() == len(shape) else data:
                for chunk in group.split(step):
                    chunk = chunk.to("cpu", slot.dtype).contiguous()
                    if not is_finite(chunk):
                        self.error = not_finite(name, chunk.dtype)
                        return
                    self._write_rows(slot, chunk, place, row, index[1].start if len(index) > 1 else 0)
                    place += len(chunk) * row
        except OSError as error:
            self._fail(slot.file, error)

    def _write_rows(self, slot: Slot, chunk: Tensor, place: int, row: int, column: int) -> None:
        """Whole rows at once, parts of rows one by one."""
        file, data = self._files[slot.file], _bytes(chunk)
        width = len(data) // len(chunk)
        length = len(data) if width == row else width
        for number, begin in enumerate(range(0, len(data), length)):
            at, done = place + number * row + column * chunk.itemsize, 0
            while done < length:
                end = begin + min(length, done + CHUNK_BYTES)
                done += os.pwrite(file, data[begin + done : end], at + done)

    def close(self) -> Exception | None:
        """Flush to the disk; returns what went wrong, if anything did: a UserError or an OSError."""
        for name, file in self._files.items():
            try:
                os.fsync(file)
            except OSError as error:
                self._fail(name, error)
            os.close(file)
        self._files.clear()
        return self.error

    def _fail(self, file: str, error: OSError) -> None:
        self.error = self.error or OSError(f"cannot write {self.folder / file}: {error.strerror}")
