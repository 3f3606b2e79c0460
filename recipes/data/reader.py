"""The rows of files as recipes read them: by our names, by kind, each with its place."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.chat import Chat
from recipes.data.errors import DataError, at
from recipes.data.fields import Fields, as_messages, with_system_prompt
from recipes.data.files import Place, placed_rows
from recipes.data.keys import remedy
from recipes.data.settings import RowsSection
from recipes.data.tokenizer import Tokenizer

if TYPE_CHECKING:  # reading text needs no torch
    from recipes.data.video import VideoReader

__all__ = ["FileRow", "Opening", "Rows"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """Something else than the row itself that says what its prompt is.

    Attributes:
        write: (row) -> messages or plain text; raises ValueError for a row that is none of its own.
        tools: offered in all prompts.
        keys: of rows, that it reads; None: it does not say.
    """

    write: Callable[[Mapping[str, Any]], Any]
    tools: Sequence[Mapping[str, Any]] = ()
    keys: Collection[str] | None = ()

    def of(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The row with that as its prompt or messages.

        Raises:
            DataError: a row that is none of its own, or has tools beside.
        """
        with at(where):
            prompt = self.write(row)
        read = {key: value for key, value in row.items() if key not in ("prompt", "messages")}
        if not isinstance(prompt, (str, list, tuple)):
            raise DataError(
                f"{where}: the environment's start gave {str(prompt)[:40]!r}: it must give messages or a text"
            )
        if isinstance(prompt, str):
            if self.tools:
                raise DataError(
                    f"{where}: tools are offered by a chat template, and the prompt is plain text: write messages"
                )
            return read | {"prompt": prompt}
        if self.tools and read.get("tools") is not None:
            raise DataError(f"{where}: the row has tools, and the environment offers its own: leave them out")
        return read | {"messages": [*prompt]} | ({"tools": [*self.tools]} if self.tools else {})


@dataclass(frozen=True)
class FileRow:
    """A row of a file.

    Attributes:
        row: what it holds.
        read: the same without keys that are ignored.
        kind: "prompt" or "messages", which of them it carries.
        place: file and line.
    """

    row: dict[str, Any]
    read: dict[str, Any]
    kind: str
    place: Place

    @property
    def where(self) -> str:
        return str(self.place)


class Rows:
    """The rows of a path, and what reading prompts and pairs of them has in common.

    Attributes:
        used: by kind, keys that are read.
        too_long: how many rows are left out for that, and what is to be said of the first.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        video: VideoReader | None,
        section: RowsSection,
        opening: Opening | None = None,
    ):
        self.path, self.tokenizer, self.video, self.section, self.opening = path, tokenizer, video, section, opening
        self.chat = Chat(tokenizer, section.chat_template_kwargs, section.ignored_keys)
        self.too_long: tuple[int, str] = (0, "")
        if opening is not None and (section.system_prompt is not None or section.prompt_as_message):
            key = "prompt_as_message" if section.prompt_as_message else "system_prompt"
            raise DataError(
                f"data.{key} is set, and trainer.grpo.environment writes prompts itself: leave one of them out"
            )
        media = {"video", "features"}
        self.used = {"prompt": {"prompt", *media}, "messages": {"messages", "tools", "chat_template_kwargs", *media}}

    def __iter__(self) -> Iterator[FileRow]:
        section, ignored, fields, count = self.section, {*self.section.ignored_keys}, Fields(self.section.fields), 0
        first: tuple[str, dict] | None = None
        for place, stored in placed_rows(self.path, ignored):
            where, count, first = str(place), count + 1, first or (str(place), stored)
            row, absent = fields.rename(stored, where)
            read = {key: value for key, value in row.items() if key not in ignored}
            read = read if self.opening is None else self.opening.of(read, where)
            if section.prompt_as_message:
                read = as_messages(read, "response" in self.used["prompt"])
            if section.system_prompt is not None:
                read = with_system_prompt(read, section.system_prompt, where)
            yield FileRow(row, read, _kind(read, where, fields.lacks(absent)), place)
        for ours, theirs in fields.unseen.items():
            raise DataError(
                f"{first[0]}: the row has no {theirs}, which data.fields.{ours} reads, and no other row of {self.path} has it; "
                f"it has {', '.join(first[1]) or 'nothing'}"
            )
        self._say_too_long(count)
        named = [key for key in ("chat_template", "chat_template_kwargs") if getattr(self.section, key)]
        if named and not self.chat.used:
            raise DataError(f"data.{named[0]} is set, and no row of {self.path} has messages: leave it out")

    def leave_out(self, row: FileRow, why: str) -> None:
        """A row that is too long.

        Raises:
            DataError: data.overlong=error.
        """
        if self.section.overlong == "error":
            raise DataError(f"{row.where}: {why}, or set data.overlong=filter to leave such rows out")
        self.too_long = self.too_long[0] + 1, self.too_long[1] or f"{row.where}: {why}"

    def _say_too_long(self, rows: int) -> None:
        count, first = self.too_long
        if count == rows:
            raise DataError(f"all {rows} rows of {self.path} are too long; {first}")
        if count and os.environ.get("RANK", "0") == "0":
            logger.warning(
                "%d of %d rows of %s are left out as too long; the first is %s", count, rows, self.path, first
            )


def _kind(row: dict, where: str, lacks: str) -> str:
    """Which of `prompt` and `messages` the row carries. A null counts as absent: tables are exported that way."""
    present = [key for key in ("prompt", "messages") if row.get(key) is not None]
    if len(present) != 1:
        keys = ", ".join(row) or "nothing"
        found = "both prompt and messages" if present else f"neither prompt nor messages (only {keys})"
        remedies = [f"; {key}: {remedy(key)}" for key in row if not present and remedy(key)]
        raise DataError(f"{where}: {found}; a row carries exactly one of them{''.join(remedies)}{lacks}")
    return present[0]
