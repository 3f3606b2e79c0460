"""GenBiasEval and GenHintEval in tokens, and the text that is read beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from megatron_ext.bias.prompts import BiasPrompt, PromptsConfig
from megatron_ext.bias.public_sets import (
    CoreferenceQuestion,
    SentencePair,
    read_winogender_sentences,
    read_winogender_templates,
)
from megatron_ext.blocks.importance import BiasProbe
from recipes.data.errors import DataError, at
from recipes.data.jsonl import check_text, numbered_rows
from recipes.data.keys import check_keys
from recipes.data.tokenizer import Tokenizer

__all__ = [
    "PromptSet", "answer_tokens", "load_prompt_sets", "load_texts", "pair_tokens", "question_rows", "read_winogender",
    "sentence_rows",
]  # fmt: skip

CARRIER = "because"  # stands before the pair in our templates


@dataclass(frozen=True)
class PromptSet:
    """Prompts about some professions, with their tokens: without a hint, and with one."""

    bias: list[BiasPrompt]
    bias_tokens: list[list[int]]
    hinted: list[BiasPrompt]
    hinted_tokens: list[list[int]]

    @property
    def swapped(self) -> list[tuple[list[int], list[int]]]:
        """Hinted prompts that differ in their hint alone, as `hint_prompts` orders them."""
        return list(zip(self.hinted_tokens[::2], self.hinted_tokens[1::2], strict=True))

    @property
    def content(self) -> list[tuple]:
        """What a run computes with, a row for each prompt."""
        pairs = [*zip(self.bias, self.bias_tokens, strict=True), *zip(self.hinted, self.hinted_tokens, strict=True)]
        return [(prompt.profession, prompt.hint, tokens) for prompt, tokens in pairs]

    def without_hint(self, limit: int) -> list[tuple[BiasPrompt, list[int]]]:
        """At most `limit` prompts without a hint, evenly spread, with their tokens."""
        return _spread(list(zip(self.bias, self.bias_tokens, strict=True)), limit)

    def probe(self, pair: tuple[int, int], limit: int | None, seed: int) -> BiasProbe:
        """What the estimators ask: at most `limit` prompts of each kind, evenly spread."""
        pairs = None if limit is None else limit // 2
        return BiasProbe(_spread(self.bias_tokens, limit), _spread(self.swapped, pairs), pair, seed)


def _spread(items: list, limit: int | None) -> list:
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def answer_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The tokens of every word after a space.

    Raises:
        DataError: the tokens of one begin with those of another, so that the one's probability would hold the other's.
    """
    found = [tokenizer.encode_pair(CARRIER, f" {word}")[1] for word in words]
    for one, other in permutations(range(len(words)), 2):
        if found[one] == found[other]:
            raise DataError(f"data.prompts.pair: {words[one]!r} and {words[other]!r} are the same tokens")
        if found[other][: len(found[one])] == found[one]:
            raise DataError(
                f"data.prompts.pair: tokenizer {tokenizer.path} begins {words[other]!r} with the tokens of {words[one]!r}, whose "
                "probability so holds the other's: choose other words, or another model"
            )
    return found


def pair_tokens(tokenizer: Tokenizer, words: tuple[str, str]) -> tuple[int, int]:
    """The token of either word after a space, for what is trained or located: it compares next tokens.

    Raises:
        DataError: a word that is more than one token, or both the same.
    """
    found = answer_tokens(tokenizer, words)
    for word, tokens in zip(words, found, strict=True):
        if len(tokens) != 1:
            raise DataError(
                f"tokenizer {tokenizer.path} reads {word!r} after a space as {len(tokens)} tokens, and training compares the "
                "next token: choose other words for data.prompts.pair, or another model (recipes/eval_bias.py takes them)"
            )
    return found[0][0], found[1][0]


def load_prompt_sets(settings: PromptsConfig, tokenizer: Tokenizer, max_length: int) -> dict[str, PromptSet]:
    """train, dev, test and all.

    Raises:
        UserError: professions that cannot be read or split, a prompt of more than `max_length` tokens, or one behind which a word
            of the pair has other tokens than elsewhere.
    """
    sets = {name: _prompt_set(part, settings, tokenizer) for name, part in settings.professions().items()}
    everything = sets["all"]
    longest = max(len(tokenizer.encode(f" {word}")) for word in settings.pair.words)
    for prompts, rows in (
        (everything.bias, everything.bias_tokens),
        (everything.hinted, everything.hinted_tokens),
    ):
        for prompt, tokens in zip(prompts, rows, strict=True):
            _checked((tokens, []), prompt.prompt, max_length - longest)
    letters = "".join(sorted({c for p in (*everything.bias, *everything.hinted) for c in p.prompt}))
    tokenizer.check_whole(letters, tokenizer.encode(letters))
    _check_continued((*everything.bias, *everything.hinted), tokenizer, settings.pair.words)
    return sets


def _prompt_set(professions: list[str], settings: PromptsConfig, tokenizer: Tokenizer) -> PromptSet:
    bias, hinted = settings.prompts(professions)
    return PromptSet(
        bias,
        [tokenizer.encode_prompt(p.prompt) for p in bias],
        hinted,
        [tokenizer.encode_prompt(p.prompt) for p in hinted],
    )


def _check_continued(prompts: Iterable[BiasPrompt], tokenizer: Tokenizer, words: Sequence[str]) -> None:
    """Prompts that end alike are asked about once."""
    for text in {prompt.prompt[-20:]: prompt.prompt for prompt in prompts}.values():
        for word in words:
            if tokenizer.encode_pair(text, f" {word}")[1] != tokenizer.encode_pair(CARRIER, f" {word}")[1]:
                raise DataError(
                    f"tokenizer {tokenizer.path} reads {word!r} behind {text[-20:]!r} otherwise than behind {CARRIER!r}, and the "
                    "scores compare the same tokens: let the template end with a word"
                )


def load_texts(path: str | Path, tokenizer: Tokenizer, max_length: int) -> list[list[int]]:
    """Rows {"text"} in tokens; those of fewer than two have nothing to predict and are refused."""
    texts: list[list[int]] = []
    for line, row in numbered_rows(path):
        check_keys(row, {"text"}, f"{path}:{line}")
        text = row.get("text")
        if not isinstance(text, str):
            raise DataError(f'{path}:{line}: the row has no text; expected {{"text": "..."}}')
        check_text(text, "text", f"{path}:{line}")
        with at(f"{path}:{line}"):
            tokens = tokenizer.encode_prompt(text)
            tokenizer.check_whole(text, tokens)
        if not 2 <= len(tokens) <= max_length:
            raise DataError(f"{path}:{line}: the text has {len(tokens)} tokens; from 2 to {max_length} can be read")
        texts.append(tokens)
    return texts


def sentence_rows(
    pairs: list[SentencePair], tokenizer: Tokenizer, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """(what stands before, sentence) of both sentences of every pair, whose likelihoods are compared.

    The begin token stands before each whether the tokenizer puts it there or not: without it the first word would not be
    scored.
    """
    sentences = [s for p in pairs for s in (p.more_stereotypical, p.less_stereotypical)]
    return [_checked(([tokenizer.begin_id], tokenizer.encode(s)), s, max_length) for s in sentences]


def question_rows(
    questions: list[CoreferenceQuestion], tokenizer: Tokenizer, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """(question, answer) for both answers of every question, in the words of lm-evaluation-harness's `winogender_all`
    (seen in 0.4.13), with which accuracies can be compared."""
    rows = []
    for question in questions:
        text = f"{question.sentence} ‘{question.pronoun.capitalize()}’ refers to the"
        for choice in question.choices:
            try:
                row = tokenizer.encode_pair(text, f" {choice}")
            except DataError as error:
                raise DataError(f"{error}; leave data.winogender_path out for this model") from error
            rows.append(_checked(row, text, max_length))
    return rows


def _checked(row: tuple[list[int], list[int]], text: str, max_length: int) -> tuple[list[int], list[int]]:
    if (length := len(row[0]) + len(row[1])) > max_length:
        raise DataError(f"{text[:60]!r}... has {length} tokens; the model reads at most {max_length}")
    return row


def read_winogender(path: str | Path) -> list[CoreferenceQuestion]:
    """templates.tsv or all_sentences.tsv, told by the first line."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        sentences = file.readline().startswith("sentid")
    return read_winogender_sentences(path) if sentences else read_winogender_templates(path)
