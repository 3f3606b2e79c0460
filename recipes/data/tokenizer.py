"""What the recipes need of a Hugging Face tokenizer: texts and conversations to tokens and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from recipes.data.errors import DataError
from recipes.data.template import ChatTemplate

__all__ = ["Tokenizer", "load_tokenizer"]


class Tokenizer:
    """What the recipes need of a Hugging Face fast tokenizer. See `load_tokenizer`.

    Attributes:
        path: where it was loaded from, as given.
        eos_id: ends a response.
        stop_ids: all tokens that end one when it is sampled: `eos_id`, and what `stop_at` has been told.
        pad_id: the end token where there is no padding token.
        begin_id: stands before a text whose first token is to be predicted, too; the end token where there is no begin
            token.
        template: what writes conversations.
        end_checked: whether it is known how the template ends a response, see `other_end`.
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
        self.stop_ids: tuple[int, ...] = (self.eos_id,)
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.begin_id: int = self.eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.template = ChatTemplate(tokenizer, path)
        self.end_checked = False
        # What tokenizer.json carries is undone, for all calls of the backend that follow.
        tokenizer("a", truncation=False, padding=False, split_special_tokens=False)
        self._adds_tokens = self._ids("a", True) != self._ids("a", False)
        # Ids may have gaps.
        self.vocab_size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))

    def stop_at(self, ids: Sequence[int], named_by: str) -> None:
        """Also these tokens end a response when it is sampled.

        Args:
            named_by: the file or key that names them.

        Raises:
            DataError: there is no such token.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"{named_by} ends responses with token {token}, tokenizer {self.path} has {self.vocab_size} tokens: name "
                    "others, or the tokenizer that belongs to the model"
                )
        self.stop_ids = tuple(dict.fromkeys((*self.stop_ids, *ids)))

    def encode(self, text: str) -> list[int]:
        """The text alone, and all of it: a truncation or padding that tokenizer.json carries is not applied."""
        return self._ids(text, False)

    def check_whole(self, text: str, ids: Sequence[int]) -> None:
        """Refuse a text of which something that can be seen is in none of its tokens: what a vocabulary does not have is left
        out without a word, unless there is an unknown token, or one for each byte.

        Args:
            ids: the tokens of the text, special ones beside them or not.

        Raises:
            DataError: the character.
        """
        decoded = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if decoded.endswith(text):
            return
        lost = next(self._left_out(text), None)
        if lost is None and decoded.count("\ufffd") > text.count("\ufffd"):  # some of a character's bytes
            lost = next((c for c in text if "\ufffd" in self.decode(self.encode(c))), None)
        if lost is not None:
            raise DataError(
                f"tokenizer {self.path} has no token for {lost!r} and would leave it out: name another in model.tokenizer, or "
                "change the text"
            )

    def _left_out(self, text: str) -> Iterator[str]:
        """Characters that can be seen and that no token stands for."""
        end = 0
        spans = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for start, stop in [*spans["offset_mapping"], (len(text), len(text))]:
            yield from (c for c in text[end:start] if c.isprintable() and not c.isspace())
            end = max(end, stop)

    def encode_prompt(self, text: str) -> list[int]:
        """A text that something follows: with the special tokens that the tokenizer itself puts before it, such as Llama's
        begin token, and without those that it puts behind. Nothing, if the text alone is no token.

        Raises:
            DataError: between its special tokens the tokenizer reads the text otherwise than alone.
        """
        alone = self.encode(text)
        if not self._adds_tokens:
            return alone
        whole = self._ids(text, True)
        for start in range(len(whole) - len(alone) + 1):
            if whole[start : start + len(alone)] == alone:
                return whole[: start + len(alone)] if alone else []
        raise DataError(
            f"the tokenizer of {self.path} reads {text[:40]!r} otherwise with its special tokens than without: it cannot be "
            "said where a response begins; name another in model.tokenizer"
        )

    def encode_pair(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """A prompt as `encode_prompt` has it, and the tokens that a response adds to it: together those of the whole text.

        Raises:
            DataError: the end of the prompt and the beginning of the response make a token together; or as `encode_prompt`.
        """
        start, whole = self.encode_prompt(prompt), self.encode_prompt(prompt + response)
        if whole[: len(start)] != start:
            raise DataError(
                f"tokenizer {self.path} reads {prompt[-20:]!r} otherwise when {response[:20]!r} follows, because a token spans "
                "the end of the one and the beginning of the other: cut the text elsewhere; white space goes to the beginning "
                "of what follows"
            )
        return start, whole[len(start) :]

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # Half of the time of transformers' own call, which asks for no more.
        return self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

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

    def decode_whole(self, ids: Sequence[int]) -> str:
        """The text with its special tokens, to be read: it shows where turns begin and end."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def text_of(self, token: int) -> str:
        """One token's, special or not."""
        return self.decode_whole([token])

    def without_special(self, text: str) -> str:
        """The text with no special token's text in it, for what is not ours, such as a tool's output."""
        names = tuple(str(t) for t in self._tokenizer.added_tokens_decoder.values() if t.special)
        lasts, longest, kept = {name[-1] for name in names}, max(map(len, names), default=0), []
        for character in text:  # what is taken out may make another of what stands around it
            kept.append(character)
            if character in lasts:
                tail = "".join(kept[-longest:])
                if hit := max((name for name in names if tail.endswith(name)), key=len, default=""):
                    del kept[-len(hit) :]
        return "".join(kept)

    def is_special(self, token: int) -> bool:
        known = self._tokenizer.added_tokens_decoder.get(token)
        return known is not None and known.special

    def decode_response(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """The text that a response adds to its prompt. Alone it would be another one: a SentencePiece tokenizer takes the
        space off the first word of a text."""
        size = 8  # tokens of the prompt that stand before it: enough, unless they show nothing, or cut a character
        while True:
            tail = list(prompt[-size:])
            before = self.decode(tail)
            if size >= len(prompt) or (before and "\ufffd" not in before):
                break
            size *= 2
        whole = self.decode([*tail, *response])
        # Not all of `before` where bytes of the response do not complete the prompt's last character.
        return whole[len(os.path.commonprefix([before, whole])) :]

    def other_end(self, response: Sequence[int]) -> str | None:
        """What to say where the assistant's message, as a chat template ends it, holds another end than the one that ends a
        response: a model that keeps to the template is then sampled to the limit each time. (Base models of Qwen 2.5 come like
        that.)"""
        if any(token in response for token in self.stop_ids):
            return None
        known = self._tokenizer.added_tokens_decoder
        special = [token for token in response if token in known and known[token].special]
        eos = self._tokenizer.eos_token
        if special:
            end = self._tokenizer.convert_ids_to_tokens(special[-1])
            said, remedy = f"with {end!r}", f'set "eos_token": {json.dumps(end)} in tokenizer_config.json of its folder'
        else:
            said, remedy = "with no special token", f"write {eos!r} behind the assistant's content in its chat template"
        return (
            f"the chat template of {self.path} ends a response {said}, sampling stops at its eos_token {eos!r}, which such "
            f"responses never contain: {remedy} (or of a copy that model.tokenizer names)"
        )

    def digests(self) -> dict[str, str]:
        """Of all that makes one tokenizer another, by name; the same for a copy that `save` has written. Its rules, which another
        version of the library may write otherwise, go by that version, too."""
        known, backend = self._tokenizer.get_vocab(), self._tokenizer.backend_tokenizer
        vocabulary = [""] * self.vocab_size
        for token, number in known.items():
            vocabulary[number] = max(vocabulary[number], token)
        added = [(i, str(t), t.special, t.lstrip, t.rstrip, t.normalized, t.single_word)
                 for i, t in sorted(self._tokenizer.added_tokens_decoder.items())]  # fmt: skip
        steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
        found = {
            "vocabulary": vocabulary,
            "special tokens": [self.eos_id, self.pad_id, self.begin_id, added],
            "chat template": self._tokenizer.chat_template,
            f"rules (tokenizers {version('tokenizers')})": [
                *(step and json.loads(step.__getstate__()) for step in steps),
                xxhash.xxh3_64_hexdigest(backend.model.__getstate__()),  # large, and in an order of its own
            ],
        }
        texts = {name: json.dumps(value, sort_keys=True) for name, value in found.items()}
        return {name: xxhash.xxh3_64_hexdigest(text.encode()) for name, text in texts.items()}

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
