"""Text in: rows of files to prompts and to prompt/response pairs.

Every complaint about a row names its file and line, or row of a table, and every key of a row is read, declared by the
reward, or refused (`recipes.data.keys`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.conversation import Conversation
from recipes.data.errors import DataError, at
from recipes.data.files import Place
from recipes.data.jsonl import check_text
from recipes.data.keys import HARMLESS, check_keys
from recipes.data.reader import FileRow, Opening, Rows
from recipes.data.settings import RowsSection
from recipes.data.tokenizer import Tokenizer

if TYPE_CHECKING:  # reading text needs no torch
    from megatron_ext.models.media import MediaPrompt
    from recipes.data.video import Clip, VideoReader

__all__ = ["Pair", "Prompt", "load_pairs", "load_prompts"]

PLAIN = RowsSection()


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, the whole row for the reward, the row's line in its file, from 1, its video, the conversation that
    it is, if it is no plain text, and file and line of the row.

    Where there is a video, `placeholder` stands among the tokens once for each of the video's tokens.
    """

    tokens: tuple[int, ...]
    row: dict[str, Any]
    line: int
    clip: Clip | None = None
    placeholder: int = -1
    talk: Conversation | None = None
    place: Place | None = None

    @property
    def where(self) -> str:
        """File and line, or the line where no file is known."""
        return str(self.place or f"line {self.line}")

    @property
    def content(self) -> tuple:
        """What a run computes with, the clip's own content apart; the reward reads the row."""
        return self.tokens, self.shown, self.row

    @property
    def shown(self) -> tuple:
        """How the clip stands among the tokens."""
        return () if self.clip is None else (self.placeholder, astuple(self.clip.grid))

    def for_model(self) -> Sequence[int] | MediaPrompt:
        """The tokens, with the video's features beside them if there is one; it is read now."""
        if self.clip is None:
            return self.tokens
        from megatron_ext.models.media import MediaPrompt

        return MediaPrompt.of(self.tokens, self.placeholder, [self.clip.grid], self.clip.features())


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
        """What a run computes with, the clip's own content apart."""
        return self.prompt.tokens, self.prompt.shown, self.response, self.learnt

    @property
    def where(self) -> str:
        return self.prompt.where

    @property
    def clip(self) -> Clip | None:
        return self.prompt.clip


def load_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    video: VideoReader | None = None,
    section: RowsSection = PLAIN,
    reward_keys: Collection[str] | None = None,
    opening: Opening | None = None,
) -> list[Prompt]:
    """Prompts to respond to: rows with `prompt`, a string, or `messages`, a conversation that awaits the assistant.

    A `prompt` begins as the tokenizer begins a text (`Tokenizer.encode_prompt`), a conversation as its template says.

    Args:
        reward_keys: what the reward reads of a row beside; None: it does not say.
        opening: what makes prompts of rows; None: they are there.
    """
    prompts = []
    reader = Rows(path, tokenizer, video, section, opening)
    if opening is not None:
        reward_keys = None if None in (opening.keys, reward_keys) else {*reward_keys, *opening.keys}
    for row in reader:
        check_keys(row.read, reader.used[row.kind], row.where, reward_keys)
        talk = None
        if row.kind == "messages":
            talk = reader.chat.read(row.read, row.where)
            tokens = reader.chat.encode_prompt(talk, row.where)
        else:
            text = check_text(row.read["prompt"], "prompt", row.where)
            with at(row.where):
                tokens = tuple(tokenizer.encode_prompt(text))
                tokenizer.check_whole(text, tokens)
            _check_not_empty(tokens, row, "prompt")
        prompt = _with_video(reader, tokens, row)
        if len(prompt.tokens) > max_prompt_tokens:
            said = f"the prompt has {len(prompt.tokens)} tokens, more than data.max_prompt_length={max_prompt_tokens}"
            reader.leave_out(row, f"{said}: shorten it or raise the limit")
            continue
        prompts.append(replace(prompt, talk=talk))
    return prompts


def load_pairs(
    path: str | Path,
    tokenizer: Tokenizer,
    max_length: int,
    video: VideoReader | None = None,
    section: RowsSection = PLAIN,
    all_turns: bool = False,
) -> list[Pair]:
    """Pairs to learn: rows with `prompt` and `response`, strings, or `messages` that end with the assistant's.

    A `prompt` begins as in `load_prompts`, and its tokens with those of its `response` are the tokens of the whole text. The end
    token is appended to a `response`; a chat template ends its responses itself.

    Args:
        all_turns: learn all of the assistant's messages, not the last alone.
    """
    pairs = []
    reader = Rows(path, tokenizer, video, section)
    reader.used["prompt"] |= {"response"}
    for row in reader:
        learnt = None
        if row.kind == "messages":
            check_keys(row.read, reader.used[row.kind], row.where, harmless=HARMLESS - {"response"})
            talk = reader.chat.read(row.read, row.where)
            tokens, response, learnt = reader.chat.encode_turns(talk, all_turns, row.where)
        else:
            check_keys(row.read, reader.used[row.kind], row.where)
            tokens, response = _encode_pair(tokenizer, row)
        prompt = _with_video(reader, tokens, row)
        if prompt.placeholder in response:
            raise DataError(f"{row.where}: a video's placeholder stands in the response: a video must come before it")
        if len(prompt.tokens) + len(response) > max_length:
            said = f"prompt and response have {len(prompt.tokens)} + {len(response)} tokens, more than "
            reader.leave_out(row, f"{said}model.encoder_seq_length={max_length}: shorten them or raise the limit")
            continue
        pairs.append(Pair(prompt, response, None if learnt is None or all(learnt) else learnt))
    return pairs


def _with_video(reader: Rows, tokens: tuple[int, ...], row: FileRow) -> Prompt:
    if reader.video is None:
        if row.read.get("video") is not None or row.read.get("features") is not None:
            raise DataError(f"{row.where}: the row has a video, but data.video is not set")
        return Prompt(tokens, row.row, row.place.number, place=row.place)
    placeholder = reader.tokenizer.token_id(reader.video.settings.placeholder, "data.video.placeholder")
    folder = Path(row.place.file).parent
    clip, expanded = reader.video.read_row(row.read, tokens, placeholder, folder, row.where)
    return Prompt(tuple(expanded), row.row, row.place.number, clip, placeholder, place=row.place)


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
