"""Rows as other programs have them to rows as recipes read them: keys by other names, texts that are messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.data.errors import DataError

__all__ = ["as_messages", "lacks", "rename", "with_system_prompt"]

SYSTEM_ROLES = ("system", "developer")


def rename(row: Mapping[str, Any], names: Mapping[str, str], where: str) -> tuple[dict[str, Any], list[str]]:
    """The row by our names, and those that it has neither by ours nor by theirs.

    Args:
        names: ours -> theirs; `a.b` is the key `b` of the object `a`, unless there is a key of that name.

    Raises:
        DataError: it has a key by both.
    """
    rest, taken = dict(row), {}
    for ours, theirs in names.items():
        if _has(rest, theirs):
            taken[ours] = _take(rest, theirs)
    absent = [ours for ours in names if ours not in taken and ours not in rest]
    for ours in taken:
        if rest.get(ours) is not None:
            raise DataError(
                f"{where}: the row has {ours}, and {names[ours]}, which data.fields.{ours} reads in its place: name "
                "another, or take one of them out"
            )
    return rest | taken, absent


def lacks(names: Mapping[str, str], absent: list[str]) -> str:
    """What to say of a row without them."""
    return "".join(f"; data.fields.{ours} reads {names[ours]}, which the row lacks" for ours in absent)


def _has(row: Mapping[str, Any], name: str) -> bool:
    if name in row:
        return True
    outer, dot, inner = name.partition(".")
    return bool(dot) and isinstance(row.get(outer), dict) and _has(row[outer], inner)


def _take(row: dict[str, Any], name: str) -> Any:
    """What stands there; it is taken out, and so is what then is empty."""
    if name in row:
        return row.pop(name)
    outer, _, inner = name.partition(".")
    row[outer] = dict(row[outer])
    value = _take(row[outer], inner)
    if not row[outer]:
        del row[outer]
    return value


def as_messages(row: dict[str, Any], learnt: bool) -> dict[str, Any]:
    """A row whose `prompt` is a text, with that as the user's message.

    Args:
        learnt: `response` is the assistant's; else it is left where it stands.
    """
    if not isinstance(row.get("prompt"), str) or row.get("messages") is not None:
        return row
    messages = [{"role": "user", "content": row["prompt"]}]
    if learnt and row.get("response") is not None:
        messages.append({"role": "assistant", "content": row["response"]})
    gone = {"prompt", "response"} if learnt else {"prompt"}
    return {key: value for key, value in row.items() if key not in gone} | {"messages": messages}


def with_system_prompt(row: dict[str, Any], text: str, where: str) -> dict[str, Any]:
    """A conversation that begins with this system message.

    Raises:
        DataError: it has one, or is plain text.
    """
    messages = row.get("messages")
    if messages is None and row.get("prompt") is not None:
        raise DataError(
            f"{where}: data.system_prompt begins conversations, and the row's prompt is plain text: set "
            "data.prompt_as_message=true, or write messages"
        )
    if not isinstance(messages, list):
        return row
    if messages and isinstance(messages[0], dict) and messages[0].get("role") in SYSTEM_ROLES:
        raise DataError(
            f"{where}: messages begin with a {messages[0]['role']} message, and data.system_prompt is set: leave one of them "
            "out"
        )
    return row | {"messages": [{"role": "system", "content": text}, *messages]}
