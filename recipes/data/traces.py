"""What of a conversation its chat template does not write, and the model would therefore not see.

A template is a program: it may drop a role that it does not know, a key that it does not read, a tool, a message in an unusual
place. So it is asked. The conversation is rendered with marks in place of its texts, and every mark must be in what comes out.
What the marks stand for depends on the conversation's shape alone, so each shape is asked about once.

Marks show what a template does with any text. What it does with this one is looked up where its own rendering does not hold a
message's text: a mark is put behind it, and must come out. A template may change a text (trim it, drop the thinking of an earlier
turn) and is not to lose a message.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from recipes.data.conversation import Conversation
from recipes.data.errors import DataError

__all__ = ["Traces", "squeeze"]

# Keys that tell which call a result belongs to. Templates write results in the order of their calls.
LINKS = ("id", "tool_call_id")
LINK = "abcdef012"  # nine letters and digits, which Mistral's templates insist on
KNOWN_ROLES = ("system", "user", "assistant", "tool")
# Remedies.
PLACE = (
    f"give it a role that the template knows (most know {', '.join(KNOWN_ROLES)}), and a system message the first place"
)
TOOLS = "leave tools out, and write calls as content"
NOTHING: tuple = ("", [], {})  # what a key holds that says nothing
Render = Callable[[Conversation, bool], str]


def squeeze(text: str) -> str:
    """The text without white space, which templates add and take away."""
    return "".join(text.split())


@dataclass(frozen=True)
class _Mark:
    """A text that nobody writes, and what to say if a template does not write it either.

    Attributes:
        since: messages that the conversation had when this was said. A template may leave it out later, as thinking is. None:
            it must stay.
    """

    text: str
    complaint: str
    since: int | None = None

    def is_in(self, text: str) -> bool:
        return self.text in text.casefold()


class _Marked:
    """A conversation with marks in it.

    Attributes:
        talk: the conversation.
        marks: all of them.
        bare: (message, key) of values that hold no text, in whose place no mark can stand.
    """

    def __init__(self, talk: Conversation):
        self.marks: list[_Mark] = []
        self.bare: list[tuple[int, str]] = []
        tools = talk.tools and tuple(self._tool(i, tool) for i, tool in enumerate(talk.tools))
        self.talk = replace(
            talk, messages=tuple(map(self._message, range(len(talk.messages)), talk.messages)), tools=tools
        )

    def _mark(self, what: str, remedy: str, since: int | None = None) -> str:
        self.marks.append(_Mark(f"qzx{len(self.marks):05d}xzq", _not_written(what, remedy), since))
        return self.marks[-1].text

    def _message(self, place: int, message: dict[str, Any]) -> dict[str, Any]:
        name = f"messages[{place}]"
        others = {key for key, value in message.items() if value not in NOTHING} - {"role", "content", *LINKS}
        found: dict[str, Any] = {}
        for key, value in message.items():
            if key == "content" and (value.strip() or not others):
                what, remedy = (f"{name}.content", _beside(others)) if others else (_message(place, message), PLACE)
                found[key] = self._mark(what, remedy)
            elif key == "tool_calls":
                found[key] = [self._call(f"{name}.{key}[{i}]", call) for i, call in enumerate(value)]
            elif key in others:
                before = len(self.marks)
                found[key] = self._anything(f"{name}.{key}", value, _or_ignore(key), place + 1)
                if len(self.marks) == before:
                    self.bare.append((place, key))
            else:
                found[key] = LINK if key in LINKS else value
        return found

    def _call(self, name: str, call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            found = {key: LINK if key in LINKS else value for key, value in call.items()}
            return found | {"function": self._call(name, call["function"])}
        found = dict(call) | {"name": self._mark(f"{name}, its name", TOOLS)}
        if call["arguments"]:
            argument = self._mark(f"{name}, its arguments", TOOLS)
            found["arguments"] = {argument: self._mark(f"{name}, its arguments", TOOLS)}
        return found

    def _tool(self, place: int, tool: dict[str, Any]) -> dict[str, Any]:
        if "function" in tool:
            return tool | {"function": self._tool(place, tool["function"])}
        name = f"tools[{place}]"
        found: dict[str, Any] = tool | {"name": self._mark(f"{name}, its name", TOOLS)}
        if tool.get("description"):
            found["description"] = self._mark(f"{name}, its description", TOOLS)
        if tool.get("parameters"):
            parameter = self._mark(f"{name}, its parameters", TOOLS)
            found["parameters"] = {
                "type": "object",
                "properties": {parameter: {"type": "string"}},
                "required": [parameter],
            }
        return found

    def _anything(self, name: str, value: Any, remedy: str, since: int) -> Any:
        if isinstance(value, str):
            return self._mark(name, remedy, since)
        if isinstance(value, dict):
            return {key: self._anything(f"{name}.{key}", v, remedy, since) for key, v in value.items()}
        if isinstance(value, list):
            return [self._anything(f"{name}[{i}]", v, remedy, since) for i, v in enumerate(value)]
        return value


class Traces:
    """
    Args:
        render: (conversation, whether a generation prompt follows) -> its text. Raises DataError.
    """

    def __init__(self, render: Render):
        self._render = render
        self._complaints: dict[str, str | None] = {}

    def check(self, talk: Conversation, generate: bool, rendered: str) -> None:
        """
        Args:
            rendered: what `render` makes of the conversation.

        Raises:
            DataError: a message, key or tool that is not written.
        """
        marked = _Marked(talk)
        shape = json.dumps([marked.talk.messages, marked.talk.tools, marked.talk.variables, generate], default=str)
        if shape not in self._complaints:
            self._complaints[shape] = self._complaint(marked, generate)
        if complaint := self._complaints[shape]:
            raise DataError(complaint)
        seen = squeeze(rendered)
        for place, message in enumerate(talk.messages):
            text = message.get("content", "")
            if squeeze(text) not in seen:
                mark = _Mark("qzxbehindxzq", _not_written(_message(place, message), PLACE))
                altered = talk.with_message(place, message | {"content": text + mark.text})
                if not mark.is_in(self._render(altered, generate)):
                    raise DataError(mark.complaint)

    def _complaint(self, marked: _Marked, generate: bool) -> str | None:
        talk = marked.talk
        text = self._render(talk, generate)
        for mark in marked.marks:
            if not mark.is_in(text) and not (mark.since and mark.is_in(self._before(talk, mark.since))):
                return mark.complaint
        for place, key in marked.bare:
            message = talk.messages[place]
            without = talk.with_message(place, {k: v for k, v in message.items() if k != key})
            if self._before(talk, place + 1) == self._before(without, place + 1):
                return _not_written(f"messages[{place}].{key}", _or_ignore(key))
        for place, message in enumerate(talk.messages):
            if message["role"] not in KNOWN_ROLES and text == self._as_another(talk, place, generate):
                return (
                    f"the chat template writes messages[{place}] as it would with any role that it does not know: "
                    f"{message['role']!r} is none of its roles; most know {', '.join(KNOWN_ROLES)}"
                )
        return None

    def _before(self, talk: Conversation, count: int) -> str:
        """The conversation when it had so many messages; nothing, where that was no conversation."""
        try:
            return self._render(talk.first(count), False)
        except DataError:
            return ""

    def _as_another(self, talk: Conversation, place: int, generate: bool) -> str:
        """The conversation with a role that no template knows."""
        try:
            return self._render(talk.with_message(place, talk.messages[place] | {"role": "qzxrolexzq"}), generate)
        except DataError:
            return ""


def _message(place: int, message: dict[str, Any]) -> str:
    return f"messages[{place}] (role {message['role']!r})"


def _beside(others: set[str]) -> str:
    return f"leave it out beside {', '.join(sorted(others))}"


def _or_ignore(key: str) -> str:
    return f"remove it, or name messages.{key} in data.ignored_keys"


def _not_written(what: str, remedy: str) -> str:
    return (
        f"the chat template does not write {what}, so the model would not see it: {remedy}; or choose another template in "
        "data.chat_template"
    )
