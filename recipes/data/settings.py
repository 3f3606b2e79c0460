"""What the YAML may say about rows, in every recipe that reads prompts and conversations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["RowsSection"]


@dataclass(kw_only=True)
class RowsSection:
    # What writes conversations: the name of one of the tokenizer's chat templates, or a .jinja file; null: its default. It is
    # saved with the checkpoint's tokenizer.
    chat_template: str | None = None
    # What the chat template reads in every row, such as {enable_thinking: false}; a row's own chat_template_kwargs go before it.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Keys of rows that may be there and are not read; those of a row's messages are written messages.name.
    ignored_keys: list[str] = field(default_factory=list)
