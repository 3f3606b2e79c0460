"""Rows of trajectories, checked and packed: prompts with their responses and rewards, in token ids or in messages.

docs/rollouts.md has the format of a row. Every complaint names file and line.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.rollouts import FinishReason, Passage, Trajectory
from recipes.data.chat import Chat
from recipes.data.errors import DataError
from recipes.data.jsonl import kind
from recipes.data.keys import HARMLESS, check_keys
from recipes.data.rows import Prompt
from recipes.data.tokenizer import Tokenizer
from recipes.grpo.settings import GRPOConfig

__all__ = ["RecordedGroup", "RowReader"]

# What a dump says beside, to be read by people.
OF_DUMPS = frozenset(("number", "key", "line", "row", "prompt_text"))
OF_RESPONSES = frozenset(("reward", "rewards", "finish_reason", "text", "advantage", "old_logprobs", "mismatch"))
REASONS = ", ".join(FinishReason)


@dataclass(frozen=True)
class PackedPassage:
    """A passage in 12 bytes a token.

    Attributes:
        tokens: array of int32.
        logprobs: array of float64, NaN where it is not known; None: observed.
    """

    tokens: array
    logprobs: array | None
    weight_version: int | None = None


@dataclass(frozen=True)
class RecordedGroup:
    """A prompt and all that followed it.

    Attributes:
        pieces, reasons, rewards: of each response.
        line: in its file, from 1.
    """

    prompt: tuple[int, ...]
    pieces: list[list[PackedPassage]]
    reasons: list[FinishReason]
    rewards: list[float]
    line: int

    @property
    def content(self) -> tuple:
        """What a run computes with."""
        said = [(p.tokens.tolist(), p.logprobs is None) for response in self.pieces for p in response]
        return self.prompt, said, [str(reason) for reason in self.reasons], self.rewards

    @property
    def where(self) -> str:
        return f"line {self.line}"

    @property
    def trajectories(self) -> list[Trajectory]:
        passages = [[Passage(p.tokens, p.logprobs, p.weight_version) for p in response] for response in self.pieces]
        return [Trajectory(p, reason) for p, reason in zip(passages, self.reasons, strict=True)]

    def for_prompt(self) -> Prompt:
        return Prompt(self.prompt, {}, self.line)


class RowReader:
    """Rows to groups."""

    def __init__(self, config: GRPOConfig, tokenizer: Tokenizer):
        self.config, self.settings, self.tokenizer = config, config.trainer.grpo, tokenizer
        self.chat = Chat(tokenizer, config.data.chat_template_kwargs, config.data.ignored_keys)
        self.ignored = frozenset(config.data.ignored_keys)

    def group(self, row: Mapping[str, Any], where: str, line: int) -> RecordedGroup:
        read = {key: value for key, value in row.items() if key not in self.ignored and value is not None}
        in_tokens = _form(read, where)
        used = (
            {"responses", "prompt_tokens"} if in_tokens else {"responses", "messages", "tools", "chat_template_kwargs"}
        )
        check_keys(read, used, where, harmless=HARMLESS | OF_DUMPS)
        if in_tokens:
            prompt = tuple(self._ids(read["prompt_tokens"], f"{where}: prompt_tokens"))
        else:
            prompt = self.chat.encode_prompt(self.chat.read(read, where), where)
        if len(prompt) > (limit := self.config.data.max_prompt_length):
            raise DataError(
                f"{where}: the prompt has {len(prompt)} tokens, more than data.max_prompt_length={limit}: shorten it or raise "
                "the limit"
            )
        responses, wanted = read.get("responses"), self.settings.samples_per_prompt
        if not isinstance(responses, list):
            raise DataError(f"{where}: responses must be a list of objects, got {kind(responses)}")
        if len(responses) != wanted:
            raise DataError(
                f"{where}: the prompt has {len(responses)} responses, trainer.grpo.samples_per_prompt={wanted}: all groups are "
                "of that size; leave out or add some, or set it to the number that all rows have"
            )
        places = [f"{where}: responses[{i}]" for i in range(wanted)]
        found = [self._response(r, read, prompt, place) for r, place in zip(responses, places, strict=True)]
        pieces, reasons, rewards = (list(part) for part in zip(*found, strict=True))
        return RecordedGroup(prompt, pieces, reasons, rewards, line)

    def _response(
        self, response: Any, row: Mapping[str, Any], prompt: tuple[int, ...], where: str
    ) -> tuple[list[PackedPassage], FinishReason, float]:
        if not isinstance(response, dict):
            raise DataError(f"{where} must be an object, got {kind(response)}")
        response = {key: value for key, value in response.items() if value is not None}
        forms = [key for key in ("passages", "tokens", "messages") if key in response]
        allowed = ["messages"] if "messages" in row else ["passages", "tokens"]
        if len(forms) != 1 or forms[0] not in allowed:
            raise DataError(
                f"{where} has {' and '.join(forms) or 'neither tokens nor messages'}: beside "
                f"{'messages' if 'messages' in row else 'prompt_tokens'} it has {' or '.join(allowed)}"
            )
        check_keys(response, {forms[0], "logprobs", "weight_version"} if forms == ["tokens"] else {forms[0]}, where,
                   harmless=OF_RESPONSES)  # fmt: skip
        if forms == ["messages"]:
            pieces = self._said(response["messages"], row, prompt, where)
        elif forms == ["tokens"]:
            own = {key: response[key] for key in ("tokens", "logprobs", "weight_version") if key in response}
            pieces = [self._passage(own, where)]
        else:
            passages = response["passages"]
            if not isinstance(passages, list) or not passages:
                raise DataError(f"{where}.passages must be a list of objects with tokens, got {kind(passages)}")
            pieces = [self._passage(p, f"{where}.passages[{i}]") for i, p in enumerate(passages)]
        self._check_length(pieces, where)
        return pieces, _reason(response, where), _reward(response, where)

    def _check_length(self, pieces: list[PackedPassage], where: str) -> None:
        length, limit = sum(len(piece.tokens) for piece in pieces), self.settings.length_params.max_length
        if length > limit:
            raise DataError(
                f"{where} has {length} tokens, more than trainer.grpo.length_params.max_length={limit}: cut it off, with "
                'finish_reason "length", or raise the limit'
            )
        if all(piece.logprobs is None for piece in pieces):
            raise DataError(f"{where} has observed tokens alone: there is nothing to train; leave the row out")

    def _passage(self, passage: Any, where: str) -> PackedPassage:
        if not isinstance(passage, dict):
            raise DataError(f"{where} must be an object, got {kind(passage)}")
        passage = {key: value for key, value in passage.items() if value is not None}
        check_keys(passage, {"tokens", "logprobs", "observed", "weight_version"}, where, harmless=())
        tokens = array("i", self._ids(passage.get("tokens"), f"{where}.tokens"))
        observed, version = passage.get("observed", False), passage.get("weight_version")
        if not isinstance(observed, bool):
            raise DataError(f"{where}.observed must be true or false, got {kind(observed)}")
        if version is not None and (not isinstance(version, int) or isinstance(version, bool) or version < 0):
            raise DataError(f"{where}.weight_version must be a whole number, 0 or more, got {version!r}")
        if observed and (given := [key for key in ("logprobs", "weight_version") if key in passage]):
            raise DataError(
                f"{where} has {given[0]}, and is observed: what nobody sampled has none; take one of them out"
            )
        logprobs = None if observed else _logprobs(passage.get("logprobs"), len(tokens), f"{where}.logprobs")
        return PackedPassage(tokens, logprobs, version)

    def _ids(self, ids: Any, where: str) -> list[int]:
        if not isinstance(ids, list) or not ids:
            raise DataError(
                f"{where} must be a list of token ids, not empty, got {kind(ids) if ids != [] else 'an empty one'}"
            )
        size = self.tokenizer.vocab_size
        for i, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < size:
                raise DataError(
                    f"{where}[{i}] is {str(token)[:40]!r}, no token id of {self.tokenizer.path}, whose ids are 0 to {size - 1}: "
                    "name the tokenizer that the ids are of, or correct them"
                )
        return ids

    def _said(self, messages: Any, row: Mapping[str, Any], prompt: tuple[int, ...], where: str) -> list[PackedPassage]:
        """What the assistant says is sampled, what others say in between is observed."""
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}.messages must be a list of messages, got {kind(messages)}")
        before = len(row["messages"])
        talk = self.chat.read(
            {**row, "messages": [*row["messages"], *messages]}, f"{where}, behind the prompt's {before} messages"
        )
        if talk.messages[before]["role"] != "assistant":
            raise DataError(
                f"{where}.messages begins with the {talk.messages[before]['role']}'s: the assistant's must follow a prompt"
            )
        begin, tokens, sampled = self.chat.encode_turns(talk, True, where, before)
        if begin != prompt:
            raise DataError(
                f"{where}: the chat template of {self.tokenizer.path} writes the prompt otherwise when its response "
                "follows: give token ids, or name another template in data.chat_template"
            )
        pieces = []
        for said, part in itertools.groupby(zip(tokens, sampled, strict=True), key=lambda pair: pair[1]):
            ids = array("i", [token for token, _ in part])
            pieces.append(PackedPassage(ids, array("d", [math.nan]) * len(ids) if said else None))
        return pieces


def _form(row: Mapping[str, Any], where: str) -> bool:
    """Whether a row is in tokens."""
    forms = [key for key in ("prompt_tokens", "messages") if key in row]
    if len(forms) != 1:
        found = " and ".join(forms) or f"neither prompt_tokens nor messages (only {', '.join(row) or 'nothing'})"
        raise DataError(
            f"{where}: {found}; a row of trajectories carries exactly one of them (docs/rollouts.md has the format)"
        )
    return forms == ["prompt_tokens"]


def _logprobs(values: Any, count: int, where: str) -> array:
    if values is None:
        return array("d", [math.nan]) * count
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, list) else kind(values)
        raise DataError(
            f"{where} must be a list of {count} numbers, one for each token, got {got}; leave it out if they are not known"
        )
    for i, x in enumerate(values):
        if x is not None and (type(x) not in (int, float) or x > 1e-3):
            raise DataError(
                f"{where}[{i}] is {str(x)[:40]!r}: a log-probability is a number, 0 or less, in nats; null where it is not known"
            )
    return array("d", [math.nan if x is None else x for x in values])


def _reward(response: Mapping[str, Any], where: str) -> float:
    value = response.get("reward")
    if type(value) not in (int, float):
        raise DataError(f"{where} needs a reward, a number, got {kind(value) if value is not None else 'none'}")
    return float(value)


def _reason(response: Mapping[str, Any], where: str) -> FinishReason:
    value = response.get("finish_reason", FinishReason.STOP)
    if value not in list(FinishReason):
        raise DataError(f"{where}.finish_reason is {str(value)[:40]!r}: it is one of {REASONS}; without one it is stop")
    return FinishReason(value)
