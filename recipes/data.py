"""JSONL in, token ids out: tokenizers, prompts, prompt and response pairs, and the order in which they are seen.

Whatever is wrong with a file is a `DataError` that names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["DataError", "EpochSampler", "Pair", "Prompt", "Tokenizer", "load_pairs", "load_prompts", "load_tokenizer",
           "read_jsonl"]  # fmt: skip


class DataError(ValueError):
    """One line: which file and line, what is wrong."""


class Tokenizer:
    """A Hugging Face fast tokenizer, reduced to what training needs.

    Attributes:
        path: the folder or name it was loaded from.
        eos_id: ends every response.
        vocab_size: ids run from 0 to this, added tokens included.
    """

    def __init__(self, tokenizer, path: str):
        self._tokenizer, self.path = tokenizer, path
        if tokenizer.eos_token_id is None:
            raise DataError(f"tokenizer {path} has no end-of-text token; set eos_token in its tokenizer_config.json")
        self.eos_id: int = tokenizer.eos_token_id
        self.vocab_size = len(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool) -> list[int]:
        """Token ids of a chat through the tokenizer's template.

        Raises:
            DataError: the tokenizer has no chat template.
        """
        if not self._tokenizer.chat_template:
            raise DataError(f"tokenizer {self.path} has no chat template; use rows with prompt (and response) instead")
        text = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return self.encode(text)

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(str(folder))


def load_tokenizer(path: str) -> Tokenizer:
    """Load a tokenizer folder (or a hub name, where there is a hub).

    Raises:
        DataError: nothing there that transformers can read, or no end-of-text token.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    looks_local = path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1
    if looks_local and not Path(path).exists():  # or transformers would look for it on a hub, for minutes
        raise DataError(f"model.tokenizer={path} does not exist")
    if Path(path).exists() and not (Path(path) / "tokenizer_config.json").is_file():
        raise DataError(f"model.tokenizer={path} is not a tokenizer folder: it has no tokenizer_config.json")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"model.tokenizer={path} cannot be loaded: {reason}") from None
    return Tokenizer(tokenizer, str(path))


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, row) of each line that is not blank.

    Raises:
        DataError: no such file, no row in it, or a line that is not a JSON object in UTF-8.
    """
    path, rows = Path(path), 0
    if not path.is_file():
        raise DataError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: malformed JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a row must be a JSON object, got {type(row).__name__}")
            rows += 1
            yield number, row
    if not rows:
        raise DataError(f"{path} has no rows")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the row it came from, which the reward reads."""

    tokens: tuple[int, ...]
    row: dict
    line: int


@dataclass(frozen=True)
class Pair:
    """A prompt and the response to learn, ended by the end-of-text token."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    line: int


def load_prompts(path: str, tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    """Prompts from rows with `prompt` or `messages`.

    Raises:
        DataError: see the module, and a prompt that is empty or longer than `max_prompt_tokens`.
    """
    prompts = []
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        if "messages" in row:
            messages = _messages(row, where)
            if messages[-1]["role"] == "assistant":
                raise DataError(f"{where}: the last message is the assistant's; a prompt ends with the user's")
            tokens = tokenizer.encode_chat(messages, add_generation_prompt=True)
        else:
            tokens = tokenizer.encode(_text(row, "prompt", where))
        if not tokens:
            raise DataError(f"{where}: the prompt is empty")
        if len(tokens) > max_prompt_tokens:
            raise DataError(
                f"{where}: the prompt has {len(tokens)} tokens, more than data.max_prompt_length={max_prompt_tokens}"
            )
        prompts.append(Prompt(tuple(tokens), row, number))
    return prompts


def load_pairs(path: str, tokenizer: Tokenizer, max_length: int) -> list[Pair]:
    """Pairs from rows with `prompt` and `response`, or with `messages` that end with the assistant's.

    Raises:
        DataError: see the module, and an empty response or a pair longer than `max_length`.
    """
    pairs = []
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        if "messages" in row:
            prompt, response = _split_chat(_messages(row, where), tokenizer, where)
        else:
            prompt = tokenizer.encode(_text(row, "prompt", where))
            response = tokenizer.encode(_text(row, "response", where))
            if response:
                response = [*response, tokenizer.eos_id]
        if not prompt or not response:
            raise DataError(f"{where}: the {'response' if prompt else 'prompt'} is empty")
        if len(prompt) + len(response) > max_length:
            raise DataError(
                f"{where}: prompt and response have {len(prompt) + len(response)} tokens, more than "
                f"model.encoder_seq_length={max_length}"
            )
        pairs.append(Pair(tuple(prompt), tuple(response), number))
    return pairs


def _text(row: dict, key: str, where: str) -> str:
    if key not in row:
        raise DataError(f"{where}: the row has no {key!r} (nor 'messages'), only {sorted(row)}")
    if not isinstance(row[key], str):
        raise DataError(f"{where}: {key!r} must be a string, got {type(row[key]).__name__}")
    return row[key]


def _messages(row: dict, where: str) -> list[dict]:
    messages = row["messages"]
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not good or not messages:
        raise DataError(f"{where}: 'messages' must be a non-empty list of objects with the strings role and content")
    return messages


def _split_chat(messages: list[dict], tokenizer: Tokenizer, where: str) -> tuple[list[int], list[int]]:
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise DataError(f"{where}: the last of at least two messages must be the assistant's, which is what is learned")
    prompt = tokenizer.encode_chat(messages[:-1], add_generation_prompt=True)
    whole = tokenizer.encode_chat(messages, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise DataError(
            f"{where}: the chat template does not continue its own generation prompt; give prompt and response"
        )
    return prompt, whole[len(prompt) :]


class EpochSampler:
    """Shuffled indices, epoch after epoch without end; every rank draws the same order and takes its own slice.

    Args:
        count: items.
        batch: indices per `next()`, over all ranks.
        seed: of the order.
        rank, world: of the data-parallel group.

    Raises:
        ValueError: `batch` does not divide by `world`.
    """

    def __init__(self, count: int, batch: int, seed: int, rank: int, world: int):
        if batch % world:
            raise ValueError(f"a batch of {batch} is not divisible by the data-parallel size {world}")
        self.count, self.batch, self.rank, self.world = count, batch, rank, world
        self.seed, self.drawn = seed, 0
        self._epoch, self._order = -1, []

    def next(self) -> list[int]:
        """This rank's indices of the next global batch."""
        share = self.batch // self.world
        first = self.drawn + self.rank * share
        self.drawn += self.batch
        return [self._index(i) for i in range(first, first + share)]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**31)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator).tolist()
        return self._order[place]

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]
