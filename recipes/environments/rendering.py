"""Tokens of what an environment answers, as the chat template writes them behind what the model has said.

What the model has said is never written again, let alone made into tokens again: templates drop thinking from earlier turns, and
text need not become the tokens that were sampled. Only what stands between the end of a turn and the place where the model
speaks again is taken from the template, which is given a turn that nobody says.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from recipes.data.conversation import Conversation, read_conversation
from recipes.data.errors import DataError
from recipes.data.tokenizer import Tokenizer
from recipes.data.traces import squeeze
from recipes.environments.environment import Messages, Turn

__all__ = ["answer_tokens"]

SAID = "qzxsaidxzq"


def answer_tokens(
    tokenizer: Tokenizer,
    prompt: Conversation | None,
    turns: Sequence[Turn],
    answer: Messages | str,
    ended_by: int,
    ends: Collection[int],
) -> tuple[int, ...]:
    """What the model reads before it speaks again.

    Args:
        prompt: the conversation of the prompt; None: it was plain text.
        turns: so far, the last one not answered yet.
        answer: messages, or text where the prompt is one.
        ended_by: the last token of the last turn.
        ends: tokens that end turns.

    Raises:
        DataError: the answer is none, the template does not write it, or no turn ends as sampling does.
    """
    if isinstance(answer, str) != (prompt is None):
        wanted, got = ("plain text", "messages") if prompt is None else ("messages", "plain text")
        raise DataError(f"the prompt is {wanted} and the answer {got}: they must be alike")
    if prompt is None:
        text = tokenizer.without_special(answer)
        tokens = tuple(tokenizer.encode(text))
        tokenizer.check_whole(text, tokens)
        return _not_empty(tokens)
    messages = _messages(tokenizer, answer)
    talk = [*prompt.messages]
    for turn in turns[:-1]:
        talk += [_stub(turn), *_messages(tokenizer, turn.answer)]
    talk += [_stub(turns[-1]), *messages]
    rendered = tokenizer.template.render(talk, True, prompt.tools, prompt.variables)
    at = _end_of_turn(tokenizer, rendered, ends)
    behind = squeeze(rendered[at:])
    for message in messages:
        content = message.get("content", "")  # some templates write it as JSON text
        if not any(squeeze(form) in behind for form in (content, json.dumps(content, ensure_ascii=False)[1:-1])):
            raise DataError(
                f"the chat template of {tokenizer.path} does not write the content of a message of the {message['role']}'s: give "
                "it a role that the template knows, or name another in data.chat_template"
            )
    begin, whole = tokenizer.encode(rendered[:at]), tokenizer.encode(rendered)
    if whole[: len(begin)] != begin:
        raise DataError(
            f"in the chat template of {tokenizer.path} the end of a turn and what follows are one token: it cannot be said where "
            "a turn ends; name another in data.chat_template"
        )
    tail = whole[len(begin) :]
    tokenizer.check_whole(rendered[at:], tail)
    end = (
        () if ended_by == begin[-1] else begin[-1:]
    )  # a stop string has no end, and another token is not the template's
    return _not_empty((*end, *tail))


def _messages(tokenizer: Tokenizer, answer: Messages) -> list[dict[str, Any]]:
    """As a row's are read, without special tokens in any of their texts: a tool's output must not end a turn."""
    if not answer:
        raise DataError("the answer has no messages")
    found = read_conversation({"messages": list(answer)}, (), "the answer").messages
    return [_plain(tokenizer, message) for message in found]


def _plain(tokenizer: Tokenizer, value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(tokenizer, key): _plain(tokenizer, x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(tokenizer, x) for x in value]
    return tokenizer.without_special(value) if isinstance(value, str) else value


def _stub(turn: Turn) -> dict[str, Any]:
    """A turn of the same kind that nobody says."""
    if not turn.calls:
        return {"role": "assistant", "content": SAID}
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name or "unknown", "arguments": {SAID: SAID}}}
        for c in turn.calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _end_of_turn(tokenizer: Tokenizer, rendered: str, ends: Collection[int]) -> int:
    """Behind the token that ends the last turn."""
    said = rendered.rfind(SAID)
    if said < 0:
        raise DataError(
            f"the chat template of {tokenizer.path} does not write the assistant's message once another follows: name another in "
            "data.chat_template"
        )
    found = [(token, rendered.find(tokenizer.text_of(token), said)) for token in ends]
    found = [(token, at) for token, at in found if at >= 0]
    special = [
        (token, at) for token, at in found if tokenizer.is_special(token)
    ]  # others may stand in a call's own text
    places = [at + len(tokenizer.text_of(token)) for token, at in special or found]
    if not places:
        raise DataError(
            f"the chat template of {tokenizer.path} ends the assistant's message with none of the tokens that end a response: "
            "name the one that it writes in trainer.grpo.sampling_params.stop_token_ids"
        )
    return min(places)


def _not_empty(tokens: tuple[int, ...]) -> tuple[int, ...]:
    if not tokens:
        raise DataError("the answer has no tokens")
    return tokens
