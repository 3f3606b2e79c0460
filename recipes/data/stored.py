"""Rows in tokens as files of a folder, which every process of a machine maps into its memory.

    rows.json       what the folder is for, and how long its files are and their checksums
    index.bin       int64 [rows, 8], see `IndexColumn`
    tokens.bin      int32, of every row its prompt's, then its response's
    learnt.bin      one byte for each token of the responses of which not all is learnt
    texts.bin       of every row JSON: the row for the reward, and the conversation
    digests.bin     eight bytes of every row, `row_digest`

Numbers are little-endian.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, overload

import numpy as np

from megatron_ext.runtime.checkpoint_files import checksum, self_checksum
from recipes.data.conversation import Conversation
from recipes.data.digests import RowsDigest, digest_of, row_digest
from recipes.data.files import Place
from recipes.data.rows import Pair, Prompt

__all__ = ["EncodedRows", "StoredRows", "encode_rows", "write_rows"]

HEAD = "rows.json"
FILES = ("index", "tokens", "learnt", "texts", "digests")
INDEX, TOKENS = np.dtype("<i8"), np.dtype("<i4")
NONE = -1


class IndexColumn(IntEnum):
    """Of the index."""

    TOKENS = 0  # where the row's begin
    PROMPT = 1  # how many of them are its prompt's
    RESPONSE = 2  # and its response's; NONE: it is a prompt alone
    LEARNT = 3  # where its bytes begin that say so; NONE: all of the response is learnt
    TEXT = 4  # where its text begins
    TEXT_LENGTH = 5
    FILE = 6  # number of its file
    LINE = 7  # or row, from 1


@dataclass(frozen=True)
class EncodedRows:
    """Rows of one file, one behind the other, as their bytes; places in the index count from the first of these rows.

    Attributes:
        index: int64 [rows, 8].
        bytes_of: of every other file, by its name.
    """

    index: np.ndarray
    bytes_of: dict[str, bytes]


def encode_rows(items: Sequence[Prompt | Pair], file: int) -> EncodedRows:
    """
    Args:
        items: without videos.
        file: number of the file that they stand in.
    """
    index = np.empty((len(items), len(IndexColumn)), INDEX)
    tokens, learnt, texts, digests = [], [], [], []
    counts = dict.fromkeys(FILES, 0)
    for i, item in enumerate(items):
        prompt, response, mask = (item, None, None) if isinstance(item, Prompt) else _parts(item)
        assert not prompt.media
        talk = prompt.talk and [prompt.talk.messages, prompt.talk.tools, prompt.talk.variables]
        text = json.dumps([prompt.row, talk]).encode()
        index[i] = (
            counts["tokens"], len(prompt.tokens), NONE if response is None else len(response),
            NONE if mask is None else counts["learnt"], counts["texts"], len(text), file, prompt.line,
        )  # fmt: skip
        both = [*prompt.tokens, *(response or ())]
        tokens.append(np.array(both, TOKENS).tobytes())
        texts.append(text)
        digests.append(row_digest(item.content))
        counts["tokens"] += len(both)
        counts["texts"] += len(text)
        if mask is not None:
            learnt.append(bytes(mask))
            counts["learnt"] += len(mask)
    parts = {"tokens": tokens, "learnt": learnt, "texts": texts, "digests": digests}
    return EncodedRows(index, {name: b"".join(part) for name, part in parts.items()})


def _parts(pair: Pair) -> tuple[Prompt, tuple[int, ...], tuple[bool, ...] | None]:
    return pair.prompt, pair.response, pair.learnt


def write_rows(folder: Path, parts: Iterable[EncodedRows], said: dict[str, Any]) -> None:
    """Fill an empty folder.

    Args:
        said: what it is for, and what its reader is to be told; JSON. May be filled while the parts come.
    """
    rows, counts = 0, dict.fromkeys(FILES, 0)
    files = {name: open(folder / f"{name}.bin", "wb") for name in FILES}
    try:
        for part in parts:
            index = part.index.copy()
            index[:, IndexColumn.TOKENS] += counts["tokens"] // TOKENS.itemsize
            index[:, IndexColumn.TEXT] += counts["texts"]
            index[index[:, IndexColumn.LEARNT] != NONE, IndexColumn.LEARNT] += counts["learnt"]
            for name, data in {"index": index.tobytes(), **part.bytes_of}.items():
                counts[name] += files[name].write(data)
            rows += len(index)
    finally:
        for file in files.values():
            file.close()
    sums = {name: checksum(folder / f"{name}.bin") for name in FILES}
    head = {**said, "rows": rows, "files": sums}
    (folder / HEAD).write_text(json.dumps(head | {"checksum": self_checksum(head)}), encoding="utf-8")


class StoredRows(Sequence):
    """Rows in tokens, each made when it is asked for.

    Attributes:
        said: what `write_rows` was told.
    """

    def __init__(self, folder: Path, said: dict[str, Any], files: Sequence[str]):
        self.said, self._files, self._folder = said, tuple(files), folder
        self._index = self._mapped("index", INDEX).reshape(-1, len(IndexColumn))
        self._tokens, self._learnt = self._mapped("tokens", TOKENS), self._mapped("learnt", np.dtype("u1"))
        self._texts = self._mapped("texts", np.dtype("u1"))

    @classmethod
    def open(cls, folder: Path, expected: dict[str, Any], files: Sequence[str]) -> StoredRows | str:
        """
        Args:
            expected: of what it says it is for.
            files: that the rows stand in, as they are called now.

        Returns:
            Where it cannot be used, why.
        """
        try:
            said = json.loads((folder / HEAD).read_text(encoding="utf-8"))
            if said.pop("checksum") != self_checksum(said):
                return f"{HEAD} is not what was written"
            if any(said.get(key) != value for key, value in expected.items()):
                return "it is for other rows"
            for name in FILES:
                if checksum(folder / f"{name}.bin") != said["files"][name]:
                    return f"{name}.bin is not what was written"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"it cannot be read ({type(error).__name__}: {error})"
        return cls(folder, said, files)

    def _mapped(self, name: str, dtype: np.dtype) -> np.ndarray:
        if not self.said["files"][name][0]:  # nothing, which cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(self._folder / f"{name}.bin", dtype, "r")

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> Prompt | Pair: ...

    @overload
    def __getitem__(self, place: slice) -> list[Prompt | Pair]: ...

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self._item(i) for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self._item(place)

    def __iter__(self) -> Iterator[Prompt | Pair]:
        return map(self._item, range(len(self)))

    def _item(self, i: int) -> Prompt | Pair:
        begin, prompt, response, learnt, text, length, file, line = self._index[i].tolist()
        tokens = self._tokens[begin : begin + prompt + max(response, 0)].tolist()
        row, talk = json.loads(self._texts[text : text + length].tobytes())
        found = Prompt(tuple(tokens[:prompt]), row, line, place=Place(self._files[file], line))
        if talk is not None:
            messages, tools, variables = talk
            talk = Conversation(tuple(messages), None if tools is None else tuple(tools), variables)
            found = dataclasses.replace(found, talk=talk)
        if response == NONE:
            return found
        mask = None if learnt == NONE else tuple(map(bool, self._learnt[learnt : learnt + response].tolist()))
        return Pair(found, tuple(tokens[prompt:]), mask)

    @property
    def digest(self) -> RowsDigest:
        """Of all rows, as `rows_digest` of what they hold."""
        data = self._mapped("digests", np.dtype("u1")).tobytes()
        return digest_of([data[i : i + 8] for i in range(0, len(data), 8)])
