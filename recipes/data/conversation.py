"""Conversations in: a row's messages, tools and template variables, checked and as a chat template reads them.

They come as OpenAI, TRL and ms-swift have them: content may be null beside tool_calls, or a list of text parts; arguments and
tools may be JSON text. A null counts as absent everywhere, because tables are exported that way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from recipes.data.errors import DataError
from recipes.data.jsonl import check_text, kind, parse_json

__all__ = ["Conversation", "read_conversation"]


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    Attributes:
        messages: each with a role, and with content, a string, or tool_calls.
        tools: JSON schemas; None: without.
        variables: what else the template reads, such as enable_thinking.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def first(self, count: int) -> Conversation:
        """As it was when it had so many messages."""
        return replace(self, messages=self.messages[:count])

    def with_message(self, place: int, message: dict[str, Any]) -> Conversation:
        """With another message in this place, or behind the last."""
        return replace(self, messages=(*self.messages[:place], message, *self.messages[place + 1 :]))


def read_conversation(row: Mapping[str, Any], ignored: Collection[str], where: str) -> Conversation:
    """The conversation of a row with `messages`, and `tools` and `chat_template_kwargs` if it has them.

    Args:
        ignored: keys to leave out; those of messages are written `messages.name`.

    Raises:
        DataError: something in it is not what a template could read.
    """
    messages = row["messages"]
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages must be a list of {{role, content}}, got {kind(messages)}")
    if not messages:
        raise DataError(f"{where}: messages is empty")
    hidden = {key.removeprefix("messages.") for key in ignored if key.startswith("messages.")}
    variables = row.get("chat_template_kwargs")
    if not isinstance(variables, dict | None):
        raise DataError(f"{where}: chat_template_kwargs must be an object, got {kind(variables)}")
    found = tuple(_message(m, f"messages[{i}]", hidden, where) for i, m in enumerate(messages))
    _check_results(found, where)
    return Conversation(
        found,
        _tools(row.get("tools"), where),
        _without_nulls(variables or {}),
    )


def _message(message: Any, name: str, hidden: Collection[str], where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: {name} must be an object {{role, content}}, got {kind(message)}")
    found = {key: value for key, value in _without_nulls(message).items() if key not in hidden}
    if not found.get("tool_calls", True):
        del found["tool_calls"]  # an empty list: no calls
    for key in ("role", "content"):
        if key not in message and not (key == "content" and "tool_calls" in found):
            raise DataError(f"{where}: {name} has no {key}; each message needs role and content")
    check_text(message["role"], f"{name}.role", where)
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(found["tool_calls"], f"{name}.tool_calls", where)
    if "content" in found or "tool_calls" not in found:
        found["content"] = _content(message["content"], f"{name}.content", where)
    return found


def _check_results(messages: Sequence[dict[str, Any]], where: str) -> None:
    """Refuse results that do not stand in the order of the calls that they name: few templates write those names."""
    waiting: list[Any] | None = None  # names of calls that have no result yet, where calls have names
    for i, message in enumerate(messages):
        if message["role"] != "tool":
            waiting = [call["id"] for call in message.get("tool_calls", ()) if "id" in call] or None
        elif "tool_call_id" in message and waiting is not None:
            name = message["tool_call_id"]
            if name not in waiting:
                raise DataError(
                    f"{where}: messages[{i}] is the result of {name!r}, and the calls before it that wait for one are "
                    f"{', '.join(map(repr, waiting)) or 'none'}: write results behind their calls and in their order"
                )
            waiting = waiting[waiting.index(name) + 1 :]


def _content(content: Any, name: str, where: str) -> str:
    """A string, or text parts one after the other."""
    if not isinstance(content, list):
        return check_text(content, name, where)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or set(_without_nulls(part)) != {"type", "text"}:
            said = part.get("type") if isinstance(part, dict) else kind(part)
            raise DataError(
                f'{where}: {name}[{i}] ({said}) is no {{"type": "text", "text": ...}}: parts of content must be text, or, with '
                "data.video set, images and videos"
            )
        texts.append(check_text(part["text"], f"{name}[{i}].text", where))
    return "".join(texts)


def _tool_calls(calls: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Calls with arguments as templates iterate over them: an object, and not the JSON text of one."""
    if not isinstance(calls, list):
        raise DataError(f"{where}: {name} must be a list of calls, got {kind(calls)}")
    found = []
    for i, call in enumerate(calls):
        place = f"{name}[{i}]"
        call, function = _function(call, place, where)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{place}: arguments", where)
        if not isinstance(arguments, dict):
            raise DataError(f"{where}: {place}: arguments must be an object or its JSON text, got {kind(arguments)}")
        function = function | {"arguments": arguments}
        found.append(call | {"function": function} if "function" in call else function)
    return found


def _tools(tools: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    if isinstance(tools, str):
        tools = _parsed(tools, "tools", where)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{where}: tools must be a list of functions' JSON schemas, got {kind(tools)}")
    return tuple(_function(tool, f"tools[{i}]", where)[0] for i, tool in enumerate(tools))


def _function(item: Any, place: str, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call or a tool, and the function in it: itself, where {"type": "function", "function": ...} is not around it."""
    if not isinstance(item, dict):
        raise DataError(f'{where}: {place} must be an object {{"function": {{"name": ...}}}}, got {kind(item)}')
    item = _without_nulls(item)
    function = item.get("function", item)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(
            f'{where}: {place} names no function; expected {{"type": "function", "function": {{"name": ...}}}}'
        )
    function = _without_nulls(function)
    return (item | {"function": function} if "function" in item else function), function


def _parsed(text: str, name: str, where: str) -> Any:
    try:
        return parse_json(text)
    except DataError as error:
        raise DataError(f"{where}: {name} {text[:40]!r} is no JSON: {error}") from error


def _without_nulls(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value is not None}
