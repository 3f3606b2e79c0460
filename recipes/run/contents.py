"""What a run reads, in digests that every checkpoint keeps: a run is what it holds, not what its files are called.

Where it goes on, files may have moved; what they hold must be what it was: the rows in tokens (in GRPO with all that a reward
reads of them), the tokenizer, clips by samples, and the weights that it began with, if they are there or it still reads them.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.runtime.checkpoint_files import checksum
from megatron_ext.runtime.collectives import gather_objects
from recipes.data.digests import RowsDigest, rows_digest, sampled_files
from recipes.data.files import existing_files
from recipes.data.shards import SUFFIX
from recipes.data.stored import StoredRows
from recipes.data.streaming import StreamedRows
from recipes.run.adapters import ADAPTER_KEY
from recipes.run.inputs import Inputs
from recipes.run.pretrained import START_KEY

__all__ = ["DELTA", "Contents", "difference", "is_first_here"]

logger = logging.getLogger(__name__)

VERSIONS = ("megatron-ext", "megatron-core", "torch", "transformers", "tokenizers")
NOTHING: Mapping[str, Any] = MappingProxyType({})

TOKENIZER = "model.tokenizer"
DELTA = "pretrained_checkpoint.delta_path"
ANOTHER = "it would not be the same run; "


class Contents:
    """
    Args:
        rows: what has been read, by the key that names its file: rows of `recipes.data.rows`, or plain tuples and lists.
        code: files of one's own functions, by the key that names them.
        in_order: keys whose rows are used once, one after the other: behind those that there were may come others.

    Attributes:
        found: by key of the configuration, as JSON.
    """

    def __init__(
        self,
        inputs: Inputs,
        rows: Mapping[str, Sequence[Any]] = NOTHING,
        code: Mapping[str, Path | None] = NOTHING,
        in_order: Sequence[str] = (),
    ):
        self._in_order = in_order
        self._inputs, self._code = inputs, {key: path for key, path in code.items() if path is not None}
        self._rows = {key: found for key, found in rows.items() if found}
        self.found: dict[str, dict[str, Any]] = {}
        if inputs.tokenizer is not None:
            self.found[TOKENIZER] = inputs.tokenizer.digests()
        for key in self._rows:
            self.found[key] = asdict(self._digest(key))

    def _digest(self, key: str, rows: int | None = None) -> RowsDigest:
        """Of the first rows; None: of all."""
        if rows is None and isinstance(self._rows[key], (StoredRows, StreamedRows)):
            return self._rows[key].digest
        return rows_digest([getattr(row, "content", row) for row in self._rows[key][:rows]])

    @staticmethod
    def versions() -> dict[str, str]:
        """Of what reads."""
        return {name: metadata.version(name) for name in VERSIONS}

    def complete(self) -> None:
        """What one process of a machine reads for all: files, clips and weights."""
        for key, rows in self._rows.items():
            if isinstance(rows, StreamedRows):
                continue
            # A folder of another kind is known by its rows, and so are shards, with their clips.
            if files := [file for file in existing_files(self._value(key)) if not file.endswith(SUFFIX)]:
                self.found[key]["file"] = " ".join(checksum(Path(file))[1] for file in files)
            if isinstance(rows, StoredRows):
                continue
            clips = [[file for clip in getattr(row, "media", ()) for file in clip.files] for row in rows]
            if any(clips):
                samples = sampled_files(itertools.chain(*clips))
                # As when a row had one file at most: runs of then go on.
                each = [[samples[file] for file in files] for files in clips]
                self.found[key]["clips"] = asdict(rows_digest([s if len(s) > 1 else s[0] if s else None for s in each]))
        for key, path in self._code.items():
            self.found[key] = {"code": checksum(path)[1]}
        if self._inputs.pretrained is not None and not self._inputs.start_is_gone:
            self.found[START_KEY] = {"weights": self._inputs.pretrained.digest()}
            if (path := self._value(DELTA)) and Path(path).exists():
                self.found[DELTA] = {"weights": checksum(Path(path))[1]}
        if self._inputs.adapter is not None:
            self.found[ADAPTER_KEY] = {"weights": self._inputs.adapter.digest()}

    def check_ranks(self) -> None:
        """Every rank calls it.

        Raises:
            UserError: ranks have read different things under one name: files on disks of their own, or a link that was moved.
        """
        mine = self.found
        if self._inputs.pretrained is not None and not self._inputs.start_is_gone:
            mine = mine | {START_KEY: {**mine.get(START_KEY, {}), "folder": self._inputs.pretrained.folder.name}}
        told = gather_objects((socket.gethostname(), mine))
        for rank, (host, found) in enumerate(told):
            if other := difference(told[0][1], found):
                raise UserError(
                    f"rank {rank} on {host} has read another {other} than rank 0 on {told[0][0]}: have the same files on all "
                    "machines, and name no link that is moved meanwhile"
                )

    def check(self, info: Mapping[str, Any], checkpoint: Path) -> None:
        """Compare with what the run had read that goes on from a checkpoint.

        Args:
            info: the checkpoint's.

        Raises:
            UserError: it would be another run.
        """
        before = info.get("contents")
        if before is None:
            logger.warning(
                "%s was saved before checkpoints said what their run had read: it cannot be told whether data, tokenizer and "
                "starting weights are what they were",
                checkpoint,
            )
            return
        self._check_tokenizer(before[TOKENIZER], checkpoint)
        for key, digests in before.items():
            if "rows" in digests:
                self._check_rows(key, digests, info["versions"])
            elif "code" in digests and self.found.get(key, digests) != digests:
                logger.warning("%s: the code has changed since the run began; what it gives may be something else", key)
            elif "weights" in digests:
                self._check_weights(key, digests)

    def warn(self) -> None:
        """Say at the beginning of a run what will keep it from going on."""
        if self._inputs.tokenizer is None or not self._inputs.tokenizer.template.asks_for_date:
            return
        if any(map(_talks, self._rows.values())):
            logger.warning(
                "the chat template of %s can write the date of today (strftime_now): on another day the run could not go on, "
                "as its rows would be others; give the template a date of its own",
                self._inputs.tokenizer.path,
            )

    def _check_tokenizer(self, before: dict[str, str], checkpoint: Path) -> None:
        now = self.found[TOKENIZER]
        if other := [name for name in before.keys() & now.keys() if before[name] != now[name]]:
            raise UserError(
                f"the tokenizer of {self._inputs.tokenizer.path} ({TOKENIZER}) is another than the run began with "
                f"({', '.join(sorted(other))}): {ANOTHER}name the one that it had, such as the copy in "
                f"{checkpoint / 'tokenizer'}, or choose a new folder"
            )

    def _check_rows(self, key: str, before: dict[str, Any], versions: Mapping[str, str]) -> None:
        place, now = f"{key}={self._value(key)}", self.found.get(key)
        if now is None:
            raise UserError(f"{key} is not set, and was when the run began: {ANOTHER}set it, or choose a new folder")
        if key in self._in_order and now["rows"] > (rows := before["rows"]):
            now = now | asdict(self._digest(key, rows))
        if now["whole"] != before["whole"]:
            where = self._first_difference(key, now, before)
            if now.get("file") is None or now["file"] != before.get("file") or now["rows"] != before["rows"]:
                raise UserError(
                    f"{place} holds other rows than when the run began: {where}: {ANOTHER}put them back, or choose a new folder"
                )
            raise UserError(
                f"{place} gives other tokens than when the run began, and file and tokenizer are what they were: {where}; "
                f"{self._other_reading(versions)}: {ANOTHER}mend that, or choose a new folder"
            )
        if now.get("clips", {}).get("whole") != before.get("clips", {}).get("whole"):
            where = self._first_difference(key, now["clips"], before["clips"])
            raise UserError(
                f"{place}: clips or features have other content than when the run began: {where}: {ANOTHER}put them back, or "
                "choose a new folder"
            )

    def _first_difference(self, key: str, now: dict[str, Any], before: dict[str, Any]) -> str:
        if isinstance(self._rows[key], StreamedRows):
            return "its files are others"
        if now["rows"] != before["rows"]:
            return f"it has {now['rows']} rows, and had {before['rows']}"
        here, there = (RowsDigest(found["rows"], found["whole"], found["parts"]) for found in (now, before))
        numbers, rows = here.first_difference(there), self._rows[key]
        places = [getattr(rows[i], "where", None) for i in (numbers[0], numbers[-1])]
        if len(numbers) == 1:
            return f"row {numbers[0] + 1}{f' ({places[0]})' if places[0] else ''} is the first that differs"
        stands = f" ({places[0]} to {places[1]})" if places[0] else ""
        return f"one of rows {numbers[0] + 1} to {numbers[-1] + 1}{stands} is the first that differs"

    def _other_reading(self, versions: Mapping[str, str]) -> str:
        path, now = self._inputs.tokenizer.path, self.versions()
        if self._inputs.tokenizer.template.asks_for_date:
            return f"the chat template of {path} renders it otherwise, as it writes the date of today (strftime_now)"
        if changed := [f"{name} {old}" for name, old in versions.items() if now.get(name) != old]:
            return f"it is read by other versions than then, which were {', '.join(changed)}"
        return f"the chat template of {path}, or what it calls, renders it otherwise"

    def _check_weights(self, key: str, before: dict[str, str]) -> None:
        now = self.found.setdefault(key, before)  # gone, and not needed
        if now == before:
            return
        what = f"{key}={self._value(key)} holds other weights than the run began with"
        if reader := self._inputs.config.reads_start:
            raise UserError(f"{what}, and {reader}: {ANOTHER}put them back, or choose a new folder")
        raise UserError(
            f"{what}: put them back, or set it to null: all that the run needs to go on is in its own folder"
        )

    def _value(self, key: str) -> Any:
        node: Any = self._inputs.resolved
        for name in key.split("."):
            node = (node or {}).get(name)
        return node


def _talks(rows: Sequence[Any]) -> bool:
    """Whether there is a conversation among them."""
    if isinstance(rows, StreamedRows):
        return rows.talks
    return any("messages" in getattr(getattr(row, "prompt", row), "row", {}) for row in rows)


def difference(found: Mapping[str, dict], other: Mapping[str, dict]) -> str | None:
    """What is not the same, of what both have looked at."""
    for key in sorted(found.keys() & other.keys()):
        for name in sorted(found[key].keys() & other[key].keys()):
            if found[key][name] != other[key][name]:
                return f"{key} ({name})"
    return None


def is_first_here() -> bool:
    """Whether this is the first rank of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
