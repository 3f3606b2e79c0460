"""What the YAML may say about rows, in every recipe that reads prompts and conversations."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.kinds import Speed
from recipes.cli.config import at_least
from recipes.data.curriculum import CurriculumSection

__all__ = ["HOW_KEPT", "RUN_TOKENS", "RowsSection", "TrainSetSection"]

# Where a run keeps its rows in tokens, in its folder.
RUN_TOKENS = "tokens"
# Keys that do not decide what a row of a set is.
HOW_KEPT = ("train_sets", "token_cache", "token_processes", "streaming", "streaming_window")

OVERLONG = ("filter", "error")


@dataclass
class TrainSetSection:
    # As data.train_path.
    path: str
    # Of drawn rows, those of this set are to those of another as their weights; all sets have one or none. null: as their rows,
    # times their epochs.
    weight: float | None = None
    # How often its rows are drawn at most; the other sets then go on without it. null: as often as the run asks.
    epochs: float | None = None
    # In place of data.fields; null: that.
    fields: dict[str, str] | None = None

    def check(self, name: str) -> None:
        for key in ("weight", "epochs"):
            if (value := getattr(self, key)) is not None and not 0 < value < float("inf"):
                raise UserError(f"data.train_sets.{name}.{key}={value} must be above 0 and finite")


@dataclass(kw_only=True)
class RowsSection:
    """
    Attributes:
        train_path: of sections that have one, the rows to train on where they are of one set.
    """

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
    # Several sets to train on, in place of train_path (null), each under a name: {math: {path: math.jsonl, weight: 2}, chat:
    # {path: chat.parquet, weight: 1, epochs: 3}}.
    train_sets: dict[str, TrainSetSection] = field(default_factory=dict)
    # Read rows to train on when they are drawn, for what does not fit in memory or on the disk a second time: they are shuffled
    # block by block, and each is checked when it arrives.
    streaming: bool = False
    # Blocks of rows that are shuffled with one another, and are in memory: 1,024 lines, a row group of parquet, a batch of
    # Arrow, 256 samples of a shard.
    streaming_window: int = 16
    # Rows from easy to hard, by a number that says how hard each is; null: in any order.
    curriculum: CurriculumSection | None = None
    # Folder where rows are kept in tokens, made once on a machine: neither its other ranks nor another run make them again. A
    # disk of the machine itself is best. null: tokens/ of the run's folder. Files of together less than 1 MiB are not kept.
    token_cache: Speed[str | None] = None
    # Processes that make the tokens of rows. 0: each rank by itself, and nothing is kept; null: as many as there are cores, up to
    # 16.
    token_processes: Speed[int | None] = None

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise UserError(f"data.overlong must be {' or '.join(OVERLONG)}, got {self.overlong!r}")
        theirs = list(self.fields.values())
        if twice := sorted({name for name in theirs if theirs.count(name) > 1}):
            raise UserError(f"data.fields reads {twice[0]} under two names: leave one out")
        if self.system_prompt == "":
            raise UserError("data.system_prompt is empty: write what it says, or null")
        at_least("data", self, 0, "token_processes")
        at_least("data", self, 1, "streaming_window")
        self._check_order()
        self._check_train_sets()

    def _check_order(self) -> None:
        if self.curriculum is None:
            return
        if self.streaming:
            raise UserError(
                "data.curriculum puts all rows into bins before the run, and data.streaming=true reads them when they are drawn: "
                "set one of them otherwise"
            )
        if self.train_sets:
            raise UserError(
                "data.curriculum makes bins of one set, and data.train_sets has its own shares: name one set in data.train_path, "
                "or leave data.curriculum out"
            )

    def _check_train_sets(self) -> None:
        if self.train_sets and (path := getattr(self, "train_path", None)) is not None:
            raise UserError(
                f"data.train_path={path} and data.train_sets are both set: write it as one of the sets, and data.train_path=null"
            )
        for name, section in self.train_sets.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise UserError(f"data.train_sets: {name!r} names a set: use letters, digits, _ and -")
            section.check(name)
        without = [name for name, section in self.train_sets.items() if section.weight is None]
        if 0 < len(without) < len(self.train_sets):
            raise UserError(
                f"data.train_sets.{without[0]} has no weight, and others have one: give all of them one, or none"
            )

    @property
    def trained(self) -> dict[str, TrainSetSection]:
        """By name; "" is that of train_path."""
        path = getattr(self, "train_path", None)
        return self.train_sets if path is None else {"": TrainSetSection(path)}

    def of_set(self, section: TrainSetSection) -> RowsSection:
        """What is said of the rows of one set."""
        return self if section.fields is None else replace(self, fields=section.fields)

    @staticmethod
    def train_key(name: str) -> str:
        """The dotted key of a set's path."""
        return f"data.train_sets.{name}.path" if name else "data.train_path"
