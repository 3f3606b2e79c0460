"""The files of a checkpoint: their checksums, and a way for Megatron's writers to report without a process of its own."""

from __future__ import annotations

import json
import pickle
import queue
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_ext.errors import UserError
from megatron_ext.runtime.collectives import together

__all__ = [
    "SUMS_FOLDER", "WriterResults", "check_files", "checksum", "gather_checksums", "self_checksum", "with_checksums",
]  # fmt: skip

READ_BYTES = 1 << 22
SUMS_FOLDER = "checksums"


class WriterResults:
    """What the writers of this rank's part of one save report.

    Megatron hands results from its writing processes to the training process through a queue in a third process, which
    takes a second to start and outlives a rank that is killed. A file does the same. Its content never leaves the machine's
    own temporary folder.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="megatron_ext_save_")
        self._path = Path(self._folder, "results")

    def __enter__(self) -> WriterResults:
        """Megatron uses this one for the saves that are prepared inside."""
        filesystem_async._results_queue = self
        return self

    def __exit__(self, *exception) -> None:
        filesystem_async._results_queue = None

    def put(self, results: Any) -> None:
        self._path.write_bytes(pickle.dumps(results))

    def get_nowait(self) -> Any:
        try:
            return pickle.loads(self._path.read_bytes())
        except FileNotFoundError:
            raise queue.Empty from None
        finally:
            self.discard()

    def discard(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def with_checksums(write: Callable[..., None], rank: int, buckets: list, results: WriterResults) -> None:
    """Megatron's function that writes a rank's files, in whatever process it runs; their checksums are kept beside."""
    own = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # torch's own costs as much as writing does, and is never compared
    try:
        write(rank, buckets, results)
    finally:
        torch.serialization.set_crc32_options(own)
    paths = [Path(path) for path, *_ in buckets if Path(path).is_file()]  # one may be missing: Megatron tells why
    with ThreadPoolExecutor(len(buckets)) as pool:
        sums = list(pool.map(checksum, paths))
    for path, found in zip(paths, sums, strict=True):
        place = path.parent.parent / SUMS_FOLDER / f"{path.parent.name}-{path.name}.json"
        place.write_text(json.dumps({f"{path.parent.name}/{path.name}": found}), encoding="utf-8")


def gather_checksums(folder: Path) -> dict[str, list]:
    """[bytes, XXH3] of every file in a folder by its relative path; those that writers have left are taken."""
    found: dict[str, list] = {}
    for path in (folder / SUMS_FOLDER).glob("*.json"):
        found |= json.loads(path.read_text(encoding="utf-8"))
    shutil.rmtree(folder / SUMS_FOLDER)
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in found:
            found[name] = checksum(path)
    return dict(sorted(found.items()))


def checksum(path: Path) -> list:
    """[bytes, XXH3 of 64 bits in hexadecimal] of a file."""
    size, digest = 0, xxhash.xxh3_64()
    block = memoryview(bytearray(READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(block):
            digest.update(block[:read])
            size += read
    return [size, digest.hexdigest()]


def self_checksum(info: dict[str, Any]) -> str:
    """Of what a JSON file says, to be kept in it."""
    return xxhash.xxh3_64_hexdigest(json.dumps(info).encode())


def check_files(folder: Path, part: str, sums: dict[str, list]) -> None:
    """Compare the files of one part of a checkpoint with their checksums; every rank calls it and reads its share.

    Raises:
        UserError: on every rank, one is missing, cut off or changed.
    """
    names = [name for name in sums if name.startswith(f"{part}/")]
    with together():
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            if wrong := _fault(folder / name, name, sums[name]):
                raise UserError(f"{folder} is damaged: {wrong}; take another checkpoint")


def _fault(path: Path, name: str, saved: list) -> str | None:
    """What is wrong with a file whose size and checksum are known."""
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != saved[0]:
        return f"{name} has {size} bytes, {saved[0]} were saved"
    return f"{name} is not what was saved (its checksum differs)" if checksum(path) != saved else None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
