"""How a chat template writes calls of tools, found by asking it, and calls read out of what a model says.

Models are trained on calls as their template writes them, and templates differ in what stands around a call and in what its
parts are named: Qwen's `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, Llama 3's `{"name": ..., "parameters":
{...}}`, Mistral's `[TOOL_CALLS] [{...}]`. So the template is given a call whose name and argument nobody writes, and JSON is
looked for that holds them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.data.errors import DataError
from recipes.data.template import ChatTemplate
from recipes.environments.environment import ToolCall

__all__ = ["ToolFormat", "call_id"]

NAME, ARGUMENT, VALUE = "qzxname", "qzxargument", "qzxvalue"
_DECODER = json.JSONDecoder()
_WORD = re.compile(r"[\w.-]{1,64}", re.ASCII)


def call_id(turn: int, number: int) -> str:
    """Nine letters and digits, which Mistral's templates insist on."""
    return f"call{turn % 1000:03d}{number % 100:02d}"


@dataclass(frozen=True)
class ToolFormat:
    """
    Attributes:
        marker: stands before a call's JSON; empty: the JSON is all that is said.
        name_key, arguments_key: what the parts of that are named.
        as_text: arguments are the text of a JSON object.
    """

    marker: str
    name_key: str
    arguments_key: str
    as_text: bool

    @classmethod
    def of(cls, template: ChatTemplate) -> ToolFormat:
        """
        Raises:
            DataError: the template writes no calls, or no JSON of a name and arguments.
        """
        function = {"name": NAME, "description": "a", "parameters": {"type": "object", "properties": {}}}
        call = {"id": call_id(0, 0), "type": "function", "function": {"name": NAME, "arguments": {ARGUMENT: VALUE}}}
        asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}
        tools = [{"type": "function", "function": function}]
        before = template.render([asked], True, tools)
        whole = template.render([asked, said], False, tools)
        text = whole[len(before) :] if whole.startswith(before) else whole[max(0, whole.rfind(NAME) - 400) :]
        for start in (i for i, character in enumerate(text) if character == "{"):
            if found := _of_call(text, start):
                head = _common_end(text[:start], _earlier(template, [asked, said], call["id"], tools, text[start:]))
                words = head.rstrip().rstrip("[").split()
                return cls(words[-1] if words else "", *found)
        raise DataError(
            f"the chat template of {template.path} writes a call of a tool not as JSON with its name and arguments: choose "
            "another in data.chat_template, or give the environment a method calls(text) that reads them"
        )

    def calls(self, text: str, turn: int) -> list[ToolCall]:
        """The calls in a turn, in order; those that cannot be read have a complaint.

        Args:
            text: special tokens included.
            turn: its number, for their ids.
        """
        return [
            ToolCall(*found, id=call_id(turn, number), complaint=complaint)
            for number, (found, complaint) in enumerate(self._found(text))
        ]

    def _found(self, text: str) -> Iterator[tuple[tuple[str, Mapping[str, Any]], str | None]]:
        if self.marker:
            parts = text.split(self.marker)[1:]
        else:
            parts = [text] if text.lstrip().startswith("{") else []
        for part in parts:
            said = part.lstrip()
            try:
                value, end = _DECODER.raw_decode(said)
                json.dumps(value, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:  # half of a surrogate pair among them
                yield ("", {}), f"no JSON: {error}"
                continue
            for call in value if isinstance(value, list) else [value]:
                yield self._read(call)
            if "{" in said[end:]:
                yield ("", {}), "another call behind it has no beginning of its own"

    def _read(self, call: Any) -> tuple[tuple[str, Mapping[str, Any]], str | None]:
        name = call.get(self.name_key) if isinstance(call, dict) else None
        if not isinstance(name, str) or not _WORD.fullmatch(name):
            return ("", {}), f'no object with a "{self.name_key}" of letters, digits and . _ -'
        arguments = call.get(self.arguments_key, {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                pass
        if not isinstance(arguments, dict):
            return (name, {}), f'"{self.arguments_key}" is no object'
        return (name, arguments), None


def _earlier(template: ChatTemplate, talk: list[dict], name: str, tools: list[dict], call: str) -> str | None:
    """What stands before the call once the conversation has gone on: some write a turn's thinking, even none, in the last one
    alone. None: the template refuses such a conversation."""
    more = {"role": "tool", "tool_call_id": name, "content": "a"}, {"role": "assistant", "content": "a"}
    try:
        whole = template.render([*talk, *more, {"role": "user", "content": "a"}], False, tools)
    except DataError:
        return None
    return whole[: whole.rfind(call[: call.index(VALUE)])]


def _common_end(a: str, b: str | None) -> str:
    if b is None:
        return a
    count = next(
        (i for i, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y), min(len(a), len(b))
    )
    return a[len(a) - count :]


def _of_call(text: str, start: int) -> tuple[str, str, bool] | None:
    """(key of the name, key of the arguments, whether those are text) of the JSON that begins here, if it is the call."""
    try:
        value, _ = _DECODER.raw_decode(text, start)
    except ValueError:
        return None
    names = [key for key, x in value.items() if x == NAME]
    for key, x in value.items():
        try:
            as_text, x = isinstance(x, str), json.loads(x) if isinstance(x, str) else x
        except ValueError:
            continue
        if names and x == {ARGUMENT: VALUE}:
            return names[0], key, as_text
    return None
