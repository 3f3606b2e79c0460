"""The rows of files as recipes read them: by our names, by kind, each with its place."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.chat import Chat
from recipes.data.errors import DataError, at
from recipes.data.fields import as_messages, lacks, rename, with_system_prompt
from recipes.data.files import Place
from recipes.data.keys import remedy
from recipes.data.media_rows import MEDIA_KEYS, has_media, names_files
from recipes.data.settings import RowsSection
from recipes.data.shards import media_of
from recipes.data.tokenizer import Tokenizer

if TYPE_CHECKING:  # reading text needs no torch
    from recipes.data.clips import Clip
    from recipes.data.video import VideoReader

__all__ = ["FileRow", "Opening", "Rows", "Seen"]

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


@dataclass
class Seen:
    """What has been seen of rows, to be judged when all have been read.

    Attributes:
        rows: how many.
        first: of them, and its keys.
        unseen: names of `data.fields` that no row has had, ours -> theirs.
        too_long: how many are left out for that.
        first_too_long: the first of these, and what is to be said of it.
        talked: whether a row was a conversation.
    """

    unseen: dict[str, str]
    rows: int = 0
    first: tuple[Place, list[str]] | None = None
    too_long: int = 0
    first_too_long: tuple[Place, str] | None = None
    talked: bool = False

    def add(self, later: Seen) -> None:
        """What has been seen of the rows behind these."""
        self.unseen = {ours: theirs for ours, theirs in self.unseen.items() if ours in later.unseen}
        self.rows += later.rows
        self.too_long += later.too_long
        self.first = self.first or later.first
        self.first_too_long = self.first_too_long or later.first_too_long
        self.talked = self.talked or later.talked

    def leave_out(self, place: Place, why: str, overlong: str) -> None:
        """A row that is too long.

        Args:
            overlong: `data.overlong`.

        Raises:
            DataError: data.overlong=error.
        """
        if overlong == "error":
            raise DataError(f"{place}: {why}, or set data.overlong=filter to leave such rows out")
        self.too_long += 1
        self.first_too_long = self.first_too_long or (place, why)

    def check(self, path: str | Path, section: RowsSection) -> None:
        """
        Raises:
            DataError: a key of the configuration that no row of the path has to do with, or rows that are all too long.
        """
        for ours, theirs in self.unseen.items():
            place, keys = self.first
            raise DataError(
                f"{place}: the row has no {theirs}, which data.fields.{ours} reads, and no other row of {path} has it; "
                f"it has {', '.join(keys) or 'nothing'}"
            )
        if self.too_long == self.rows:
            raise DataError(f"all {self.rows} rows of {path} are too long; {self.said_too_long}")
        named = [key for key in ("chat_template", "chat_template_kwargs") if getattr(section, key)]
        if named and not self.talked:
            raise DataError(f"data.{named[0]} is set, and no row of {path} has messages: leave it out")

    def tell(self, path: str | Path) -> None:
        """What is left out, on rank 0."""
        if self.too_long and os.environ.get("RANK", "0") == "0":
            logger.warning(
                "%d of %d rows of %s are left out as too long; the first is %s",
                self.too_long, self.rows, path, self.said_too_long,
            )  # fmt: skip

    @property
    def said_too_long(self) -> str:
        """Of the first row that is left out."""
        place, why = self.first_too_long
        return f"{place}: {why}"


class Rows:
    """What reading prompts and pairs of rows has in common.

    Attributes:
        used: by kind, keys that are read.
        seen: of the rows that have been read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        video: VideoReader | None,
        section: RowsSection,
        opening: Opening | None = None,
    ):
        self.tokenizer, self.video, self.section, self.opening = tokenizer, video, section, opening
        self.chat = Chat(tokenizer, section.chat_template_kwargs, section.ignored_keys)
        if opening is not None and (section.system_prompt is not None or section.prompt_as_message):
            key = "prompt_as_message" if section.prompt_as_message else "system_prompt"
            raise DataError(
                f"data.{key} is set, and trainer.grpo.environment writes prompts itself: leave one of them out"
            )
        self.used = {
            "prompt": {"prompt", *MEDIA_KEYS},
            "messages": {"messages", "tools", "chat_template_kwargs", *MEDIA_KEYS},
        }
        self.ignored = frozenset(section.ignored_keys)
        if section.curriculum is not None and section.curriculum.scores is None:
            for keys in self.used.values():
                keys.add(section.curriculum.field)
        self.seen = Seen(dict(section.fields))

    def take_seen(self) -> Seen:
        """And begin anew."""
        seen, self.seen = self.seen, Seen(dict(self.section.fields))
        return seen

    @cached_property
    def placeholders(self) -> tuple[int, ...]:
        """The tokens that stand for tokens of videos and images; one, where they have the same."""
        how = self.video.settings
        keys = {how.token("image"): "image_placeholder", how.placeholder: "placeholder"}
        found = {self.tokenizer.token_id(token, f"data.video.{key}"): None for token, key in reversed(keys.items())}
        return tuple(found)

    def with_media(self, row: FileRow) -> tuple[FileRow, tuple[Clip, ...]]:
        """The row with its images and videos written into its text, and those.

        Raises:
            DataError: there are some, and data.video is not set; or they cannot be used.
        """
        if self.video is None:
            if key := has_media(row.read):
                said = "has a video" if key in ("video", "features") else f"has {key}"
                raise DataError(f"{row.where}: the row {said}, but data.video is not set")
            return row, ()
        assert self.placeholders
        read, clips = self.video.read_row(row.read, row.place.folder, row.where)
        return replace(row, read=read), clips

    def read(self, place: Place, stored: dict[str, Any], beside: Sequence[str] = ()) -> FileRow:
        """
        Args:
            stored: the row as its file has it.
            beside: files of its sample in a shard, which it shows unless it names some.
        """
        section, where, seen = self.section, str(place), self.seen
        seen.rows += 1
        seen.first = seen.first or (place, list(stored))
        row, absent = rename(stored, section.fields, where)
        seen.unseen = {ours: theirs for ours, theirs in seen.unseen.items() if ours in absent}
        read = {key: value for key, value in row.items() if key not in self.ignored}
        if beside and not names_files(read):
            shown = {key: names for key, names in media_of(beside).items() if key not in self.ignored}
            row, read = row | shown, read | shown
        read = read if self.opening is None else self.opening.of(read, where)
        if section.prompt_as_message:
            read = as_messages(read, "response" in self.used["prompt"])
        if section.system_prompt is not None:
            read = with_system_prompt(read, section.system_prompt, where)
        kind = _kind(read, where, lacks(section.fields, absent))
        seen.talked = seen.talked or kind == "messages"
        return FileRow(row, read, kind, place)


def _kind(row: dict, where: str, lacks: str) -> str:
    """Which of `prompt` and `messages` the row carries. A null counts as absent: tables are exported that way."""
    present = [key for key in ("prompt", "messages") if row.get(key) is not None]
    if len(present) != 1:
        keys = ", ".join(row) or "nothing"
        found = "both prompt and messages" if present else f"neither prompt nor messages (only {keys})"
        remedies = [f"; {key}: {remedy(key)}" for key in row if not present and remedy(key)]
        raise DataError(f"{where}: {found}; a row carries exactly one of them{''.join(remedies)}{lacks}")
    return present[0]
