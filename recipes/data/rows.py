"""Text in: rows of files to prompts and to prompt/response pairs.

Every complaint about a row names its file and line, or row of a table, and every key of a row is read, declared by the
reward, or refused (`recipes.data.keys`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.conversation import Conversation
from recipes.data.errors import DataError, at
from recipes.data.files import Place, placed_rows
from recipes.data.jsonl import check_text
from recipes.data.keys import HARMLESS, check_keys
from recipes.data.media_rows import expand
from recipes.data.reader import FileRow, Opening, Rows
from recipes.data.settings import RowsSection
from recipes.data.tokenizer import Tokenizer

if TYPE_CHECKING:  # reading text needs no torch
    from megatron_ext.models.media import MediaPrompt
    from recipes.data.clips import Clip
    from recipes.data.video import VideoReader

__all__ = ["Pair", "PairReading", "Prompt", "PromptReading", "Reading", "load_pairs", "load_prompts", "read_pair"]


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, the whole row for the reward, the row's line in its file, from 1, its images and videos, the
    conversation that it is, if it is no plain text, and file and line of the row.

    One of `placeholders` stands among the tokens once for each token of each image or video, in their order.
    """

    tokens: tuple[int, ...]
    row: dict[str, Any]
    line: int
    media: tuple[Clip, ...] = ()
    placeholders: tuple[int, ...] = ()
    talk: Conversation | None = None
    place: Place | None = None

    @property
    def where(self) -> str:
        """File and line, or the line where no file is known."""
        return str(self.place or f"line {self.line}")

    @property
    def content(self) -> tuple:
        """What a run computes with, the media's own content apart; the reward reads the row."""
        return self.tokens, self.shown, self.row

    @property
    def shown(self) -> tuple:
        """How the media stand among the tokens."""
        grids = [(grid.t, grid.h, grid.w, *(grid.seconds or ())) for clip in self.media for grid in clip.items]
        return (*self.placeholders, *grids) if grids else ()

    def for_model(self) -> Sequence[int] | MediaPrompt:
        """The tokens, with the media's features beside them if there are any; they are read now."""
        if not self.media:
            return self.tokens
        from megatron_ext.models.media import MediaPrompt
        from recipes.data.clips import clip_content

        items = [item for clip in self.media for item in clip.items]
        return MediaPrompt.of(self.tokens, self.placeholders, items, clip_content(self.media))


@dataclass(frozen=True)
class Pair:
    """A prompt and what follows it, in tokens.

    Attributes:
        learnt: which tokens of the response are learnt; None: all.
    """

    prompt: Prompt
    response: tuple[int, ...]
    learnt: tuple[bool, ...] | None = None

    @property
    def num_learnt(self) -> int:
        return len(self.response) if self.learnt is None else sum(self.learnt)

    @property
    def content(self) -> tuple:
        """What a run computes with, the media's own content apart."""
        return self.prompt.tokens, self.prompt.shown, self.response, self.learnt

    @property
    def where(self) -> str:
        return self.prompt.where

    @property
    def media(self) -> tuple[Clip, ...]:
        return self.prompt.media


@dataclass(frozen=True)
class Reading(ABC):
    """How rows become what a recipe computes with.

    Attributes:
        tokenizer: with the chat template that is asked for.
        limit: tokens that a row has at most.
        video: finds the videos of rows; None: they have none.
        section: what the configuration says of rows.
    """

    tokenizer: Tokenizer
    limit: int
    video: VideoReader | None = None
    section: RowsSection = field(default_factory=RowsSection)

    @abstractmethod
    def rows(self) -> Rows:
        """What reads, with all that it remembers of rows."""

    @abstractmethod
    def read(self, rows: Rows, row: FileRow) -> Prompt | Pair | None:
        """
        Args:
            rows: of this reading.

        Returns:
            None: it is left out.

        Raises:
            DataError: with the place of the row.
        """

    @property
    @abstractmethod
    def options(self) -> tuple:
        """All beside the attributes of this class that decides what becomes of a row, as JSON."""

    def load(self, path: str | Path) -> list[Any]:
        """All of a file, a folder or a pattern.

        Raises:
            DataError: a row, or a key of the configuration that no row has to do with.
        """
        rows = self.rows()
        found = [self.read(rows, rows.read(*placed)) for placed in placed_rows(path, rows.ignored)]
        seen = rows.take_seen()
        seen.check(path, self.section)
        seen.tell(path)
        return [item for item in found if item is not None]


@dataclass(frozen=True)
class PromptReading(Reading):
    """Prompts to respond to: rows with `prompt`, a string, or `messages`, a conversation that awaits the assistant.

    A `prompt` begins as the tokenizer begins a text (`Tokenizer.encode_prompt`), a conversation as its template says.

    Attributes:
        reward_keys: what the reward reads of a row beside; None: it does not say.
        opening: what makes prompts of rows; None: they are there.
    """

    reward_keys: Collection[str] | None = None
    opening: Opening | None = None

    def rows(self) -> Rows:
        return Rows(self.tokenizer, self.video, self.section, self.opening)

    @property
    def options(self) -> tuple:
        return "prompts", self.keys and sorted(self.keys)

    @property
    def keys(self) -> Collection[str] | None:
        """Of rows, that somebody reads beside the model."""
        if self.opening is None:
            return self.reward_keys
        return None if None in (self.opening.keys, self.reward_keys) else {*self.reward_keys, *self.opening.keys}

    def read(self, rows: Rows, row: FileRow) -> Prompt | None:
        check_keys(row.read, rows.used[row.kind], row.where, self.keys)
        row, clips = rows.with_media(row)
        talk = None
        if row.kind == "messages":
            talk = rows.chat.read(row.read, row.where)
            tokens = rows.chat.encode_prompt(talk, row.where)
        else:
            text = check_text(row.read["prompt"], "prompt", row.where)
            with at(row.where):
                tokens = tuple(self.tokenizer.encode_prompt(text))
                self.tokenizer.check_whole(text, tokens)
            _check_not_empty(tokens, row, "prompt")
        prompt = _prompt(rows, tokens, row, clips)
        if len(prompt.tokens) > self.limit:
            said = f"the prompt has {len(prompt.tokens)} tokens, more than data.max_prompt_length={self.limit}"
            rows.seen.leave_out(row.place, f"{said}: shorten it or raise the limit", self.section.overlong)
            return None
        return replace(prompt, talk=talk)


@dataclass(frozen=True)
class PairReading(Reading):
    """Pairs to learn: rows with `prompt` and `response`, strings, or `messages` that end with the assistant's.

    A `prompt` begins as in `PromptReading`, and its tokens with those of its `response` are the tokens of the whole text. The
    end token is appended to a `response`; a chat template ends its responses itself.

    Attributes:
        all_turns: learn all of the assistant's messages, not the last alone.
    """

    all_turns: bool = False

    def rows(self) -> Rows:
        rows = Rows(self.tokenizer, self.video, self.section)
        rows.used["prompt"] |= {"response"}
        return rows

    @property
    def options(self) -> tuple:
        return "pairs", self.all_turns

    def read(self, rows: Rows, row: FileRow) -> Pair | None:
        pair = read_pair(rows, row, self.all_turns)
        counts = len(pair.prompt.tokens), len(pair.response)
        if sum(counts) > self.limit:
            said = f"prompt and response have {counts[0]} + {counts[1]} tokens, more than "
            why = f"{said}model.encoder_seq_length={self.limit}: shorten them or raise the limit"
            rows.seen.leave_out(row.place, why, self.section.overlong)
            return None
        return pair


def load_prompts(path: str | Path, *how: Any, **options: Any) -> list[Prompt]:
    """Arguments behind the path are those of `PromptReading`."""
    return PromptReading(*how, **options).load(path)


def load_pairs(path: str | Path, *how: Any, **options: Any) -> list[Pair]:
    """Arguments behind the path are those of `PairReading`."""
    return PairReading(*how, **options).load(path)


def read_pair(reader: Rows, row: FileRow, all_turns: bool = False) -> Pair:
    """As `PairReading` reads one, however long it is.

    Args:
        reader: that knows of `response` in rows with a prompt.
    """
    learnt = None
    if row.kind == "messages":
        check_keys(row.read, reader.used[row.kind], row.where, harmless=HARMLESS - {"response"})
        row, clips = reader.with_media(row)
        talk = reader.chat.read(row.read, row.where)
        tokens, response, learnt = reader.chat.encode_turns(talk, all_turns, row.where)
    else:
        check_keys(row.read, reader.used[row.kind], row.where)
        row, clips = reader.with_media(row)
        tokens, response = _encode_pair(reader.tokenizer, row)
    if reader.video is not None and not set(response).isdisjoint(reader.placeholders):
        raise DataError(f"{row.where}: a video's placeholder stands in the response: a video must come before it")
    prompt = _prompt(reader, tokens, row, clips)
    return Pair(prompt, response, None if learnt is None or all(learnt) else learnt)


def _prompt(reader: Rows, tokens: tuple[int, ...], row: FileRow, clips: tuple[Clip, ...]) -> Prompt:
    found = Prompt(tokens, row.row, row.place.number, place=row.place)
    if reader.video is None:
        return found
    placeholders = reader.placeholders
    lengths = [item.length for clip in clips for item in clip.items]
    expanded = tuple(expand(tokens, placeholders, lengths, row.where))
    return replace(found, tokens=expanded, media=clips, placeholders=placeholders)


def _encode_pair(tokenizer: Tokenizer, row: FileRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if row.read.get("response") is None:
        raise DataError(f"{row.where}: no response beside prompt; add the text to learn")
    texts = [check_text(row.read[key], key, row.where) for key in ("prompt", "response")]
    with at(row.where):
        prompt, response = tokenizer.encode_pair(*texts)
        tokenizer.check_whole("".join(texts), [*prompt, *response])
    _check_not_empty(prompt, row, "prompt")
    _check_not_empty(response, row, "response")
    end = () if response[-1] == tokenizer.eos_id else (tokenizer.eos_id,)
    return tuple(prompt), (*response, *end)


def _check_not_empty(tokens: Sequence[int], row: FileRow, key: str) -> None:
    if not tokens:
        reason = "is empty" if not row.read[key] else "is empty for this tokenizer: it encodes to no token"
        raise DataError(f"{row.where}: {key} {reason}; fill it or remove the row")
