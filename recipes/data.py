"""Text in: tokenizers, prompts, prompt/response pairs, and the order in which they are drawn.

Every complaint about a row names its file and line.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.config import UserError

if TYPE_CHECKING:  # reading text needs no torch
    from megatron_ext.models.media import MediaPrompt
    from recipes.video import Clip, VideoReader

__all__ = ["DataError", "EpochSampler", "Pair", "Prompt", "Tokenizer", "check_text", "load_pairs", "load_prompts",
           "load_tokenizer", "numbered_rows", "read_jsonl"]  # fmt: skip


logger = logging.getLogger(__name__)


class DataError(UserError):
    """A tokenizer or data file that cannot be used."""


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


class Tokenizer:
    """What the recipes need of a Hugging Face fast tokenizer. See `load_tokenizer`.

    Attributes:
        path: where it was loaded from, as given.
        eos_id: ends a response.
        pad_id: the end token where there is no padding token.
        begin_id: stands before a text whose first token is to be predicted, too; the end token where there is no begin
            token.
        vocab_size: rows that an embedding needs: added tokens included.
    """

    def __init__(self, tokenizer: Any, path: str):
        self._tokenizer, self.path = tokenizer, path
        if tokenizer.eos_token_id is None:
            special = ", ".join(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
            raise DataError(
                f"tokenizer {path} has no eos_token: name the token that ends a response in the tokenizer_config.json "
                f'beside tokenizer.json, as {{"eos_token": "..."}} (its special tokens: {special or "none"})'
            )
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.begin_id: int = self.eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._end_checked = False
        # Ids may have gaps.
        self.vocab_size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))

    def encode(self, text: str) -> list[int]:
        """The text alone, and all of it: a truncation or padding that tokenizer.json carries is not applied."""
        return self._ids(text, False)

    def encode_prompt(self, text: str) -> list[int]:
        """A text that something follows: with the special tokens that the tokenizer itself puts before it, such as Llama's
        begin token, and without those that it puts behind. Nothing, if the text alone is no token.

        Raises:
            DataError: between its special tokens the tokenizer reads the text otherwise than alone.
        """
        alone, whole = self._ids(text, False), self._ids(text, True)
        for start in range(len(whole) - len(alone) + 1):
            if whole[start : start + len(alone)] == alone:
                return whole[: start + len(alone)] if alone else []
        raise DataError(
            f"the tokenizer of {self.path} reads {text[:40]!r} otherwise with its special tokens than without: it cannot be "
            "said where a response begins; name another in model.tokenizer"
        )

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def token_id(self, text: str, key: str) -> int:
        """The id of a single token, named by its text."""
        found = self._tokenizer.get_vocab().get(text)
        if found is None:
            raise DataError(
                f"tokenizer {self.path} has no token {text!r} ({key}): add it as a special token, so that text never "
                "becomes it by chance"
            )
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens and otherwise untouched."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> list[int]:
        """A conversation through the chat template.

        Raises:
            DataError: the tokenizer has no template, or the template refuses the conversation.
        """
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"tokenizer {self.path} has no chat template: use rows with prompt (and response) instead of messages, "
                "or add chat_template.jinja to its folder"
            )
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, return_dict=False
            )
        except TemplateError as error:
            raise DataError(f"the chat template of {self.path} refuses messages: {error}") from error

    def warn_of_other_end(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Say, once, that the chat template ends the assistant's message with another token than the one that ends a
        response: a model that keeps to the template is then sampled to the limit each time. (Base models of Qwen 2.5 come
        like that.)

        Args:
            messages: a conversation that awaits the assistant, or ends with its message.
        """
        talk = [*messages[:-1]] if messages[-1]["role"] == "assistant" else [*messages]
        if self._end_checked or not talk:
            return
        self._end_checked = True
        try:
            start = self.encode_chat(talk, True)
            full = self.encode_chat([*talk, {"role": "assistant", "content": "a"}], False)
        except DataError:  # it will be raised where the row is read, or the template takes no such answer
            return
        response = full[len(os.path.commonprefix([start, full])) :]
        if self.eos_id in response or os.environ.get("RANK", "0") != "0":
            return
        known = self._tokenizer.added_tokens_decoder
        special = [token for token in response if token in known and known[token].special]
        eos = self._tokenizer.eos_token
        if special:
            end = self._tokenizer.convert_ids_to_tokens(special[-1])
            said, remedy = f"with {end!r}", f'set "eos_token": {json.dumps(end)} in tokenizer_config.json of its folder'
        else:
            said, remedy = "with no special token", f"write {eos!r} behind the assistant's content in its chat template"
        logger.warning(
            "the chat template of %s ends a response %s, sampling stops at its eos_token %r alone, which such responses never "
            "contain: %s (or of a copy that model.tokenizer names)",
            self.path, said, eos, remedy,
        )  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` reads, wherever this one came from."""
        self._tokenizer.save_pretrained(str(folder))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a local folder, of a tokenizer.json, or by its name on the Hugging Face hub.

    A tokenizer.json takes its eos_token and the like from the tokenizer_config.json beside it. Nothing is downloaded
    for what is written as a path.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = Path(path).expanduser()
    if place.name == "tokenizer.json" and (place.parent / "tokenizer_config.json").is_file():
        place = place.parent
    try:
        # Code from a tokenizer folder is never run, and never asked about.
        if place.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
        elif place.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(place))
        elif _is_written_as_path(str(path)):
            raise DataError(f"tokenizer {path} does not exist: name a folder with tokenizer.json")
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except DataError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        _blame_config(place, error)
        here = place.exists()
        remedy = "it needs a Hugging Face tokenizer.json" if here else "it is no local folder, and the hub gave none"
        raise DataError(f"cannot load tokenizer {path}: {remedy} ({str(error)[:200]})") from error
    return Tokenizer(tokenizer, str(path))


def _blame_config(folder: Path, error: Exception) -> None:
    """
    Raises:
        DataError: it was the config.json beside a tokenizer, which transformers reads first.
    """
    from transformers import AutoConfig

    if (folder / "config.json").is_file():
        try:
            AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as found:  # a validator's, json's or torch's: whatever the value broke
            if str(found) == str(error):
                said = " ".join(str(error).split())[:200]
                raise DataError(f"{folder / 'config.json'}: transformers refuses it: {said}; correct it") from found


def _is_written_as_path(text: str) -> bool:
    """As opposed to a name on the hub, `model` or `organisation/model`."""
    first, slash, _ = text.partition("/")
    in_a_folder = bool(slash) and (not first or Path(first).exists())
    return in_a_folder or text.startswith((".", "~")) or text.endswith((".json", "/")) or text.count("/") > 1


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are skipped."""
    return [row for _, row in numbered_rows(path)]


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


class EpochSampler:
    """Shuffled indices, epoch after epoch without end, in global batches of which this rank takes its slice.

    All ranks draw the same order. A batch that an epoch cannot fill is completed from the next one, so that every
    index is drawn once per epoch and none is left out.

    Args:
        count: number of rows.
        batch: size of a global batch, over all ranks.
        rank, world: this rank's place among the data-parallel ranks.
    """

    def __init__(self, count: int, batch: int, seed: int, rank: int, world: int):
        if count < 1 or batch < 1:
            raise ValueError(f"there is nothing to draw: {count} rows in batches of {batch}; both must be at least 1")
        if batch % world:
            raise ValueError(
                f"batch={batch} (trainer.grpo.num_prompts_per_grpo_step, or model.global_batch_size in SFT) is not "
                f"divisible by world={world}, the data-parallel size: make it a multiple"
            )
        assert 0 <= rank < world, (rank, world)
        self.count, self.batch, self.seed, self.rank, self.world = count, batch, seed, rank, world
        self._epoch = self._drawn = 0  # position: rows drawn of this epoch
        self._order = self._shuffled()

    def next(self) -> list[int]:
        """This rank's indices of the next global batch."""
        indices: list[int] = []
        while len(indices) < self.batch:
            if self._drawn == self.count:
                self._epoch, self._drawn = self._epoch + 1, 0
                self._order = self._shuffled()
            part = self._order[self._drawn : self._drawn + self.batch - len(indices)]
            self._drawn += len(part)
            indices += part
        share = self.batch // self.world
        return indices[self.rank * share : (self.rank + 1) * share]

    def state_dict(self) -> dict[str, int]:
        """The position, the same on every rank and for every batch size and number of ranks."""
        return {"epoch": self._epoch, "drawn": self._drawn, "count": self.count, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for name, here in (("count", self.count), ("seed", self.seed)):
            if state[name] != here:
                raise ValueError(
                    f"the saved order of the data was drawn with {name}={state[name]}, this run has {name}={here}: "
                    "continue with the same data file and model.seed"
                )
        self._epoch, self._drawn = state["epoch"], state["drawn"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(self.count))
        random.Random(f"{self.seed}/{self._epoch}").shuffle(order)
        return order


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
