"""What a frozen tower has computed, by the content of what it saw: in memory up to a number of bytes, on disk if asked.

A file in the folder is whole or not there, and says by a digest whether it is still what was written. Processes of a machine
share the folder: whoever wants a clip first holds its lock while it computes, and the others wait and read.

Shape legend: n media tokens, f features of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.errors import UserError, of_system
from megatron_ext.files import whole, write_whole

__all__ = ["FeatureCache", "FeatureFolder"]

logger = logging.getLogger(__name__)

OWNER = "tower.json"
RECOUNT = 64  # files of its own after which a process looks how large the folder has become


class FeatureCache:
    """The features that were asked for last, up to `limit` bytes, on the host."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str) -> Tensor:
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: str, features: Tensor) -> None:
        """[n, f] on the host; the oldest go where there is no more room."""
        if features.nbytes > self.limit or key in self._kept:
            return
        self._kept[key] = features
        self.size += features.nbytes
        while self.size > self.limit:
            self.size -= self._kept.popitem(last=False)[1].nbytes


class FeatureFolder:
    """
    Args:
        folder: made where it is not there.
        tower: digest of all that features depend on but the pixels.
        limit: bytes.

    Raises:
        UserError: the folder cannot be written to, or holds another tower's features.
    """

    def __init__(self, folder: str | Path, tower: str, limit: int):
        self.folder, self.limit = Path(folder).expanduser(), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock("folder"):
                owner = self.folder / OWNER
                if not owner.exists():
                    if any(self.folder.glob("*.safetensors")):
                        raise UserError(
                            f"{self.folder} has files and no {OWNER}: name another model.vision.cache_folder"
                        )
                    write_whole(owner, json.dumps({"tower": tower}) + "\n")
                found = json.loads(owner.read_text(encoding="utf-8")).get("tower")
        except OSError as error:
            raise UserError(f"model.vision.cache_folder: {of_system(error)}") from error
        except (ValueError, AttributeError) as error:
            raise UserError(f"{self.folder / OWNER} is damaged ({error}): remove {self.folder}") from error
        if found != tower:
            raise UserError(
                f"{self.folder} holds the features of another tower, or of this one with other weights, layers, preprocessing or "
                "precision: empty it, or name another folder in model.vision.cache_folder"
            )
        self._new, self._full = 0, self._count() >= limit

    def features(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """What is there for this content, or what `compute` makes of it, which is then there for others: [n, f] on the host."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._lock(key))
            except OSError as error:  # somebody has removed the folder, or nothing more can be written to its disk
                self._stop(error)
            found = self._read(key)
            if found is None:
                found = compute()
                self._write(key, found)
        return found

    def _stop(self, error: Exception) -> None:
        if not self._full:
            logger.warning("nothing more is kept in %s: %s", self.folder, error)
        self._full = True

    def _read(self, key: str) -> Tensor | None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(str(path), "pt") as file:
                found, told = file.get_tensor("features"), (file.metadata() or {}).get("digest")
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s): its clip is seen again", path, error)
            return None
        if told != _digest(found):
            logger.warning("%s is damaged (another digest than it says): its clip is seen again", path)
            return None
        return found

    def _write(self, key: str, features: Tensor) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self._new >= RECOUNT:
            self._new, self._full = 0, self._count() >= self.limit
        if self._full:
            return
        try:
            with whole(self.folder / f"{key}.safetensors") as path:
                save_file({"features": features.contiguous()}, str(path), {"digest": _digest(features)})
        except (SafetensorError, OSError) as error:
            self._stop(error)
        self._new += 1

    def _count(self) -> int:
        total = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        if total >= self.limit:
            logger.warning(
                "%s holds %d bytes, its limit is %d: nothing more is put into it", self.folder, total, self.limit
            )
        return total

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Held by one process of the machine at a time; of one that is killed the system takes it away."""
        with open(self.folder / f".{name[:2]}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _digest(features: Tensor) -> str:
    import xxhash

    digest = xxhash.xxh3_128(repr((features.dtype, tuple(features.shape))).encode())
    digest.update(features.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
