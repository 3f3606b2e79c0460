"""What the recipes need of a Hugging Face tokenizer: texts and conversations to tokens and back."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

__all__ = ["DataError", "Tokenizer", "load_tokenizer"]

logger = logging.getLogger(__name__)


class DataError(UserError):
    """A tokenizer or data file that cannot be used."""


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
