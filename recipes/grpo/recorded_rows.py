"""Rows of trajectories, checked and packed: prompts with their responses and rewards, in token ids or in messages.

docs/rollouts.md has the format of a row. Every complaint names file and line.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.grouping.routes import write_routes
from megatron_ext.rollouts import FinishReason, Passage, Trajectory
from recipes.data.chat import Chat
from recipes.data.errors import DataError
from recipes.data.fields import as_messages, rename, with_system_prompt
from recipes.data.files import Place
from recipes.data.jsonl import kind
from recipes.data.keys import HARMLESS, check_keys
from recipes.data.reader import Seen
from recipes.data.rows import Prompt
from recipes.data.tokenizer import Tokenizer
from recipes.grpo.settings import GRPOConfig

__all__ = ["RecordedGroup", "RowReader"]

logger = logging.getLogger(__name__)

# What a dump says beside, to be read by people.
OF_DUMPS = frozenset(("number", "key", "line", "row", "prompt_text"))
OF_RESPONSES = frozenset(
    ("reward", "rewards", "routed_experts", "finish_reason", "text", "advantage", "old_logprobs", "mismatch")
)
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
        routes: of each response, see `Trajectory`; empty: they are not known.
        place: file and line.
    """

    prompt: tuple[int, ...]
    pieces: list[list[PackedPassage]]
    reasons: list[FinishReason]
    rewards: list[float]
    place: Place
    routes: Sequence[np.ndarray] = ()

    @property
    def content(self) -> tuple:
        """What a run computes with."""
        said = [(p.tokens.tolist(), p.logprobs is None) for response in self.pieces for p in response]
        routes = [[write_routes(routes) for routes in self.routes]] if self.routes else []
        return self.prompt, said, [str(reason) for reason in self.reasons], self.rewards, *routes

    @property
    def where(self) -> str:
        return str(self.place)

    @property
    def trajectories(self) -> list[Trajectory]:
        passages = [[Passage(p.tokens, p.logprobs, p.weight_version) for p in response] for response in self.pieces]
        routes = self.routes or [None] * len(passages)
        return [Trajectory(*each) for each in zip(passages, self.reasons, routes, strict=True)]

    def for_prompt(self) -> Prompt:
        return Prompt(self.prompt, {}, self.place.number, place=self.place)


class RowReader:
    """Rows to groups, by `data.fields`, behind `data.system_prompt`, and without those that are too long.

    Args:
        replays: they are a run's own, of which none may be missing, and which have our names.
    """

    def __init__(self, config: GRPOConfig, tokenizer: Tokenizer, replays: bool = False):
        self.config, self.settings, self.tokenizer, self.section = config, config.trainer.grpo, tokenizer, config.data
        self.overlong = "error" if replays else config.data.overlong
        self.chat = Chat(tokenizer, config.data.chat_template_kwargs, config.data.ignored_keys)
        self.ignored = frozenset(config.data.ignored_keys)
        self.seen = Seen({} if replays else dict(config.data.fields), talked=True)
        self._said_tokens = False
        self.replays_routes = self.settings.router_replay == "R3"

    def groups(self, rows: Iterable[tuple[int, Mapping[str, Any]]], path: Path) -> list[RecordedGroup]:
        """Of numbered rows of a file."""
        found = [self.group(row, Place(str(path), line)) for line, row in rows]
        return [group for group in found if group is not None]

    def check(self, path: Path) -> None:
        """When all rows have been read.

        Raises:
            DataError: `data.fields` names what no row has, or all are too long.
        """
        if self.section.held_out:  # whose rows may be those that are meant
            self.seen.unseen.clear()
        self.seen.check(path, self.section)
        self.seen.tell(path)

    def group(self, row: Mapping[str, Any], place: Place) -> RecordedGroup | None:
        """None: its prompt is too long."""
        where = str(place)
        self.seen.rows += 1
        self.seen.first = self.seen.first or (place, list(row))
        row, absent = rename(row, self.section.fields, where)
        self.seen.unseen = {ours: theirs for ours, theirs in self.seen.unseen.items() if ours in absent}
        read = {key: value for key, value in row.items() if key not in self.ignored and value is not None}
        if self.section.prompt_as_message:
            read = as_messages(read, False)
        in_tokens = _form(read, where)
        if self.section.system_prompt is not None:
            read = self._behind_system_prompt(read, where)
        used = (
            {"responses", "prompt_tokens"} if in_tokens else {"responses", "messages", "tools", "chat_template_kwargs"}
        )
        check_keys(read, used, where, harmless=HARMLESS | OF_DUMPS)
        if in_tokens:
            prompt = tuple(self._ids(read["prompt_tokens"], f"{where}: prompt_tokens"))
        else:
            prompt = self.chat.encode_prompt(self.chat.read(read, where), where)
        if len(prompt) > (limit := self.section.max_prompt_length):
            why = f"the prompt has {len(prompt)} tokens, more than data.max_prompt_length={limit}: shorten it or raise the limit"
            self.seen.leave_out(place, why, self.overlong)
            return None
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
        told = zip(responses, pieces, places, strict=True)
        routes = [self._routes(r, prompt, each, place) for r, each, place in told]
        return RecordedGroup(prompt, pieces, reasons, rewards, place, routes if self.replays_routes else ())

    def _behind_system_prompt(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """Token ids are what was sampled behind, whatever stands in it."""
        if "messages" in row:
            return with_system_prompt(row, self.section.system_prompt, where)
        if not self._said_tokens and os.environ.get("RANK", "0") == "0":
            logger.info("data.system_prompt is not put before prompt_tokens, which are whole: %s", where)
        self._said_tokens = True
        return row

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

    def _routes(
        self, response: Mapping[str, Any], prompt: tuple[int, ...], pieces: list[PackedPassage], where: str
    ) -> np.ndarray | None:
        """The experts that the sampler took, where they are followed."""
        text = response.get("routed_experts")
        if (text is not None) != self.replays_routes:
            has, wanted = ("has", "R3 or leave them out") if text is not None else ("lacks", "null")
            raise DataError(
                f"{where} {has} routed_experts, and trainer.grpo.router_replay={self.settings.router_replay}: set it to {wanted}"
            )
        if text is None:
            return None
        try:
            return self.config.model.route_shape.read(text, len(prompt) + sum(len(piece.tokens) for piece in pieces))
        except UserError as error:
            raise DataError(f"{where}: {error}") from error

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
