"""Conversations to tokens, through the tokenizer's chat template."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

from recipes.data.conversation import Conversation, read_conversation
from recipes.data.errors import DataError, at
from recipes.data.jsonl import check_text
from recipes.data.tokenizer import Tokenizer
from recipes.data.traces import Traces, squeeze

__all__ = ["Chat"]

logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]


class Chat:
    """
    Args:
        variables: what the template reads in every row, `data.chat_template_kwargs`; a row's own go before them.
        ignored: see `read_conversation`.
    """

    def __init__(self, tokenizer: Tokenizer, variables: Mapping[str, Any], ignored: Collection[str]):
        self.tokenizer, self.variables, self.ignored = tokenizer, variables, ignored
        self._traces = Traces(self._render)
        self._checked: set[tuple[str, bool]] = set()

    def read(self, row: Mapping[str, Any], where: str) -> Conversation:
        talk = read_conversation(row, self.ignored, where)
        for key in talk.variables:
            self._check_variable(key, talk, f"{where}: chat_template_kwargs.{key}")
        for key in self.variables:
            self._check_variable(key, talk, f"data.chat_template_kwargs.{key}")
        place, last = len(talk.messages) - 1, talk.messages[-1]
        if not last.get("content") and "tool_calls" not in last:
            raise DataError(f"{where}: the content of messages[{place}] is empty")
        return Conversation(talk.messages, talk.tools, {**self.variables, **talk.variables})

    def _check_variable(self, key: str, talk: Conversation, name: str) -> None:
        if (key, talk.tools is None) in self._checked:
            return
        if key in (own := self.tokenizer.template.own_variables):
            raise DataError(f"{name} is what the recipe itself tells the chat template; remove it")
        names = self.tokenizer.template.variables(talk.tools)
        if key not in names:
            known = ", ".join(sorted(names - own)) or "none beside messages"
            raise DataError(
                f"{name}: the chat template of {self.tokenizer.path} reads no such variable; it reads {known}"
            )
        self._checked.add((key, talk.tools is None))

    def encode_prompt(self, talk: Conversation, where: str) -> Tokens:
        """A conversation that awaits the assistant."""
        if talk.messages[-1]["role"] == "assistant":
            raise DataError(f"{where}: the last of messages is the assistant's; a prompt ends with another role")
        with at(where):
            rendered = self._render(talk, True)
            self._traces.check(talk, True, rendered)
            self._warn_of_other_end(talk)
            return self._whole(rendered)

    def encode_turns(
        self, talk: Conversation, all_turns: bool, where: str, first: int = 0
    ) -> tuple[Tokens, Tokens, tuple[bool, ...]]:
        """A conversation that ends with the assistant's message: (prompt, response, which of its tokens are learnt).

        A turn's tokens are those that the conversation has when it has been said, behind those that it had when it was awaited;
        they are learnt as if the conversation ended there. Nothing else is.

        Args:
            all_turns: learn all of the assistant's messages; the response begins with the first of them.
            first: messages before this one are the prompt's, whoever says them.

        Raises:
            DataError: what stands before a turn, or the turn itself, is written otherwise when the conversation has gone on.
        """
        spoken = [i for i, message in enumerate(talk.messages) if i >= first and message["role"] == "assistant"]
        if not spoken or spoken[-1] != len(talk.messages) - 1:
            role = talk.messages[-1]["role"]
            raise DataError(f"{where}: the last of messages must be the assistant's, which is learnt, not the {role}'s")
        learnt = spoken if all_turns else spoken[-1:]
        if learnt[0] == 0:
            raise DataError(f"{where}: messages needs at least one message before the assistant's")
        with at(where):
            rendered = self._render(talk, False)
            self._traces.check(talk, False, rendered)
            self._warn_of_other_end(talk.first(learnt[-1]))
            whole = self._whole(rendered)
            trained = [False] * len(whole)
            spans = [self._turn(talk, place, rendered, whole) for place in learnt]
        for span in spans:
            trained[span] = [True] * len(trained[span])
        begin = spans[0].start
        return whole[:begin], whole[begin:], tuple(trained[begin:])

    def _turn(self, talk: Conversation, place: int, rendered: str, whole: Tokens) -> slice:
        """Where the message at this place stands among the tokens of the conversation."""
        message, last = talk.messages[place], place == len(talk.messages) - 1
        if not message.get("content") and "tool_calls" not in message:
            raise DataError(f"the content of messages[{place}] is empty, and it is to be learnt")
        awaited = self._render(talk.first(place), True)
        said = rendered if last else self._render(talk.first(place + 1), False)
        start, end = self._tokens(awaited), whole if last else self._tokens(said)
        if whole[: len(end)] != end or whole[: len(start)] != start or len(start) >= len(end):
            raise DataError(self._moved(place, last, rendered.startswith(said) and said.startswith(awaited)))
        if squeeze(message.get("content", "")) not in squeeze(said[len(awaited) :]):
            raise DataError(
                f"the chat template of {self.tokenizer.path} changes messages[{place}] of the assistant's, such as leaves its "
                "thinking out, so what would be learnt is not what the row says: choose another template in "
                "data.chat_template, or write what shall be learnt"
            )
        return slice(len(start), len(end))

    def _moved(self, place: int, last: bool, merges: bool) -> str:
        """Why a turn cannot be told from what stands around it."""
        template = f"the chat template of {self.tokenizer.path}"
        if merges:
            return (
                f"the tokens before messages[{place}] are not those of its generation prompt: in {template} the last characters "
                "of that, such as a space, merge with what follows; take them out"
            )
        if last:
            return (
                "the conversation does not begin with its generation prompt, so the response cannot be told from the prompt: "
                f"{template} writes another text there; use rows with prompt and response, or another template"
            )
        return (
            f"{template} writes messages[{place}], or what stands before it, otherwise once the conversation goes on (such as "
            "without its thinking), so that not all turns can be learnt from one row: set data.train_on_turns=last and give each "
            "turn a row that ends with it, or name a template in data.chat_template that leaves earlier turns as they are"
        )

    def _render(self, talk: Conversation, generate: bool) -> str:
        rendered = self.tokenizer.template.render(talk.messages, generate, talk.tools, talk.variables)
        return check_text(rendered, "what the chat template writes", self.tokenizer.path)

    def _whole(self, rendered: str) -> Tokens:
        tokens = self._tokens(rendered)
        self.tokenizer.check_whole(rendered, tokens)
        return tokens

    def _tokens(self, rendered: str) -> Tokens:
        return tuple(self.tokenizer.encode(rendered))

    def _warn_of_other_end(self, talk: Conversation) -> None:
        """Say, once, that responses end otherwise than sampling does.

        Args:
            talk: a conversation that awaits the assistant.
        """
        if self.tokenizer.end_checked:
            return
        self.tokenizer.end_checked = True
        answer = {"role": "assistant", "content": "a"}
        try:
            start = self._tokens(self._render(talk, True))
            full = self._tokens(self._render(talk.with_message(len(talk.messages), answer), False))
        except DataError:  # it will be raised where the row is read, or the template takes no such answer
            return
        said = self.tokenizer.other_end(full[len(os.path.commonprefix([start, full])) :])
        if said and os.environ.get("RANK", "0") == "0":
            logger.warning("%s", said)
