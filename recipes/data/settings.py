"""What the YAML may say about rows, in every recipe that reads prompts and conversations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_ext.errors import UserError

__all__ = ["RowsSection"]

OVERLONG = ("filter", "error")


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
    # What rows call otherwise: {prompt: question, answer: solution} reads question as prompt; reward_model.ground_truth is the
    # key ground_truth of the object reward_model.
    fields: dict[str, str] = field(default_factory=dict)
    # The prompt of a row is what a user says, and its response what the assistant does: the chat template writes them.
    prompt_as_message: bool = False
    # The system message that all conversations begin with; null: theirs, if they have one.
    system_prompt: str | None = None
    # Rows that are too long: "filter" leaves them out and says how many, "error" refuses the first.
    overlong: str = "filter"

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise UserError(f"data.overlong must be {' or '.join(OVERLONG)}, got {self.overlong!r}")
        theirs = list(self.fields.values())
        if twice := sorted({name for name in theirs if theirs.count(name) > 1}):
            raise UserError(f"data.fields reads {twice[0]} under two names: leave one out")
        if self.system_prompt == "":
            raise UserError("data.system_prompt is empty: write what it says, or null")
