"""Text in: rows of JSONL files to prompts and to prompt/response pairs.

Every complaint about a row names its file and line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.tokenizer import DataError, Tokenizer

if TYPE_CHECKING:  # reading text needs no torch
    from megatron_ext.models.media import MediaPrompt
    from recipes.data.video import Clip, VideoReader

__all__ = ["Pair", "Prompt", "check_text", "load_pairs", "load_prompts", "numbered_rows", "read_jsonl"]


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, the whole row for the reward, the row's line in its file, from 1, and its video.

    Where there is a video, `placeholder` stands among the tokens once for each of the video's tokens.
    """

    tokens: tuple[int, ...]
    row: dict[str, Any]
    line: int
    clip: Clip | None = None
    placeholder: int = -1

    def for_model(self) -> Sequence[int] | MediaPrompt:
        """The tokens, with the video's features beside them if there is one; it is read now."""
        if self.clip is None:
            return self.tokens
        from megatron_ext.models.media import MediaPrompt

        return MediaPrompt.of(self.tokens, self.placeholder, [self.clip.grid], self.clip.features())


@dataclass(frozen=True)
class Pair:
    """A prompt and the response to learn, in tokens."""

    prompt: Prompt
    response: tuple[int, ...]


def load_prompts(
    path: str | Path, tokenizer: Tokenizer, max_prompt_tokens: int, video: VideoReader | None = None
) -> list[Prompt]:
    """Prompts to respond to: rows with `prompt`, a string, or `messages`, a conversation that awaits the assistant.

    A `prompt` begins as the tokenizer begins a text (`Tokenizer.encode_prompt`), a conversation as its template says.
    """
    prompts = []
    for line, row in numbered_rows(path):
        where = f"{path}:{line}"
        if _chosen(row, where) == "messages":
            messages = _messages(row, where)
            if messages[-1]["role"] == "assistant":
                raise DataError(f"{where}: the last of messages is the assistant's; a prompt ends with another role")
            tokenizer.warn_of_other_end(messages)
            tokens = _encode_chat(tokenizer, messages, True, where)
        else:
            tokens = _encode(tokenizer.encode_prompt, row, "prompt", where)
        prompt = _with_video(video, tokenizer, tokens, row, line, path)
        if len(prompt.tokens) > max_prompt_tokens:
            raise DataError(
                f"{where}: the prompt has {len(prompt.tokens)} tokens, more than data.max_prompt_length={max_prompt_tokens}: "
                "shorten it or raise the limit"
            )
        prompts.append(prompt)
    return prompts


def load_pairs(path: str | Path, tokenizer: Tokenizer, max_length: int, video: VideoReader | None = None) -> list[Pair]:
    """Pairs to learn: rows with `prompt` and `response`, strings, or `messages` that end with the assistant's.

    A `prompt` begins as in `load_prompts`. The end token is appended to a `response`; a chat template ends its responses
    itself.
    """
    pairs = []
    for line, row in numbered_rows(path):
        where = f"{path}:{line}"
        if _chosen(row, where) == "messages":
            messages = _messages(row, where)
            tokenizer.warn_of_other_end(messages)
            prompt, response = _split_chat(tokenizer, messages, where)
        else:
            if row.get("response") is None:
                raise DataError(f"{where}: no response beside prompt; add the text to learn")
            prompt = _encode(tokenizer.encode_prompt, row, "prompt", where)
            response = _encode(tokenizer.encode, row, "response", where)
            if response[-1] != tokenizer.eos_id:
                response += (tokenizer.eos_id,)
        prompt = _with_video(video, tokenizer, prompt, row, line, path)
        if len(prompt.tokens) + len(response) > max_length:
            raise DataError(
                f"{where}: prompt and response have {len(prompt.tokens)} + {len(response)} tokens, more than "
                f"model.encoder_seq_length={max_length}: shorten them or raise the limit"
            )
        pairs.append(Pair(prompt, response))
    return pairs


def _with_video(
    video: VideoReader | None, tokenizer: Tokenizer, tokens: tuple[int, ...], row: dict, line: int, path: str | Path
) -> Prompt:
    if video is None:
        if row.get("video") is not None or row.get("features") is not None:
            raise DataError(f"{path}:{line}: the row has a video, but data.video is not set")
        return Prompt(tokens, row, line)
    placeholder = tokenizer.token_id(video.settings.placeholder, "data.video.placeholder")
    clip, expanded = video.read_row(row, tokens, placeholder, Path(path).parent, f"{path}:{line}")
    return Prompt(tuple(expanded), row, line, clip, placeholder)


def numbered_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object), streamed."""
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder: name a JSONL file")
    try:
        file = open(path, "rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a JSONL file") from error
    empty = True
    with file:
        for line, raw in enumerate(file, 1):
            if row := _parse(raw, f"{path}:{line}", first=line == 1):
                empty = False
                yield line, row[0]
    if empty:
        raise DataError(f"{path} is empty: it needs one JSON object on each line")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are skipped."""
    return [row for _, row in numbered_rows(path)]


def _parse(raw: bytes, where: str, first: bool) -> tuple[dict[str, Any]] | None:
    """The line's object, or None for a blank line."""
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1}: {error.reason}); convert the file") from error
    if not text:
        return None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {error.msg} at column {error.colno}; each line must be one JSON object") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets of thousands of levels
        raise DataError(f"{where}: {error}; each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: {_kind(row)} where a JSON object is needed, such as {{"prompt": ...}}')
    return (row,)


def _chosen(row: dict, where: str) -> str:
    """Which of `prompt` and `messages` the row carries. A null counts as absent: tables are exported that way."""
    present = [key for key in ("prompt", "messages") if row.get(key) is not None]
    if len(present) != 1:
        keys = ", ".join(row) or "nothing"
        found = "both prompt and messages" if present else f"neither prompt nor messages (only {keys})"
        raise DataError(f"{where}: {found}; a row carries exactly one of them")
    return present[0]


def _messages(row: dict, where: str) -> list[dict[str, Any]]:
    messages = row["messages"]
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages must be a list of {{role, content}}, got {_kind(messages)}")
    if not messages:
        raise DataError(f"{where}: messages is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"{where}: messages[{i}] must be an object {{role, content}}, got {_kind(message)}")
        for key in ("role", "content"):
            if key not in message:
                raise DataError(f"{where}: messages[{i}] has no {key}; each message needs role and content")
            check_text(message[key], f"messages[{i}].{key}", where)
    if not messages[-1]["content"]:
        raise DataError(f"{where}: the content of messages[{len(messages) - 1}] is empty")
    return messages


def check_text(text: Any, name: str, where: str) -> str:
    """The text, if a tokenizer can read it."""
    if not isinstance(text, str):
        remedy = "; a conversation goes under messages" if name == "prompt" and isinstance(text, list) else ""
        raise DataError(f"{where}: {name} must be a string, got {_kind(text)}{remedy}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name} holds half of a surrogate pair (\\ud800-\\udfff); repair the text") from None
    return text


def _encode(encode: Callable[[str], list[int]], row: dict, key: str, where: str) -> tuple[int, ...]:
    tokens = encode(check_text(row[key], key, where))
    if not tokens:
        reason = "is empty" if not row[key] else "is empty for this tokenizer: it encodes to no token"
        raise DataError(f"{where}: {key} {reason}; fill it or remove the row")
    return tuple(tokens)


def _encode_chat(tokenizer: Tokenizer, messages: list[dict], generate: bool, where: str) -> tuple[int, ...]:
    try:
        return tuple(tokenizer.encode_chat(messages, generate))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _split_chat(tokenizer: Tokenizer, messages: list[dict], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and response tokens of a conversation that ends with the assistant's message."""
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise DataError(f"{where}: the last of messages must be the assistant's, which is learnt, not the {role}'s")
    if len(messages) == 1:
        raise DataError(f"{where}: messages needs at least one message before the assistant's")
    prompt = _encode_chat(tokenizer, messages[:-1], True, where)
    full = _encode_chat(tokenizer, messages, False, where)
    if full[: len(prompt)] != prompt or len(full) == len(prompt):
        raise DataError(
            f"{where}: the conversation's tokens do not begin with those of its generation prompt, so the response "
            f"cannot be told from the prompt: the chat template of {tokenizer.path} writes another text there, or "
            "its last characters merge with the response; use rows with prompt and response"
        )
    return prompt, full[len(prompt) :]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
