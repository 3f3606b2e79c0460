"""What the YAML may say about rows, in every recipe that reads prompts and conversations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["RowsSection"]


@dataclass(kw_only=True)
class RowsSection:
    # What writes the messages of a row as text: the name of one of the tokenizer's chat templates, or a .jinja file,
    # for a tokenizer that has none; null: its default. It is saved with the checkpoint's tokenizer. Rows with "prompt"
    # need none.
    chat_template: str | None = None
    # What the chat template reads in every row, such as {enable_thinking: false}; a row's own chat_template_kwargs
    # override it.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Keys of rows that may be there and are not read, where others are refused; those of a row's messages are written
    # messages.name.
    ignored_keys: list[str] = field(default_factory=list)
