"""What an environment is: it writes the prompt of a row, answers the model's turns, and says when a conversation has ended.

class Doubling(Environment):
    row_keys = ("number",)
    gives_reward = True

    def start(self, row):
        return [{"role": "user", "content": f"Double {row['number']}."}]

    def step(self, talk):
        if talk.said == str(2 * talk.row["number"]):
            return End(1.0)
        return Observation([{"role": "user", "content": "No. Again."}]) if len(talk.turns) < 3 else End(0.0)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_ext.errors import UserError

__all__ = [
    "End", "Environment", "EnvironmentFailedError", "EnvironmentLostError", "Messages", "Observation", "Talk", "ToolCall", "Turn",
]  # fmt: skip

Messages = Sequence[Mapping[str, Any]]


class EnvironmentFailedError(UserError):
    """An environment that failed, or answered something else than an `Observation` or `End`."""


class EnvironmentLostError(EnvironmentFailedError):
    """One that has not come back in time, or has ended its process."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the model has written.

    Attributes:
        name: of the tool; empty where none could be read.
        arguments: as the model gave them.
        id: tells it from others.
        complaint: why it could not be read; None: it could.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str
    complaint: str | None = None

    def result(self, content: str) -> dict[str, Any]:
        """The message with which a tool answers."""
        return {"role": "tool", "name": self.name, "tool_call_id": self.id, "content": content}


@dataclass(frozen=True)
class Turn:
    """What the model has said at a time.

    Attributes:
        text: without special tokens, and with the text of its calls.
        calls: of tools, where the environment offers some.
        answer: what was observed behind it, messages or plain text; None: nothing yet.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()
    answer: Messages | str | None = None


@dataclass(frozen=True)
class Talk:
    """A conversation so far.

    Attributes:
        row: of the data file.
        turns: the last one has just ended and waits for an answer.
    """

    row: Mapping[str, Any]
    turns: tuple[Turn, ...]

    @property
    def said(self) -> str:
        """The text of the last turn."""
        return self.turns[-1].text

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls in it."""
        return self.turns[-1].calls


@dataclass(frozen=True)
class Observation:
    """The conversation goes on.

    Attributes:
        answer: messages, written by the chat template, or plain text where the prompt is one. Neither is ever trained.
        reward: for the turn, added to the others of the trajectory.
    """

    answer: Messages | str
    reward: float = 0.0


@dataclass(frozen=True)
class End:
    """The conversation is over.

    Attributes:
        reward: added to those of its turns; None: none.
    """

    reward: float | None = None


class Environment:
    """One conversation: there is one instance for each, made with the options of the YAML, and whatever it keeps is that
    conversation's alone. It has a process of its own, forked from one that has imported its module.

    Attributes:
        tools: JSON schemas of functions, offered to the model in the prompt.
        row_keys: which keys it reads of a row beside its prompt or messages; None: it does not say.
        gives_reward: it says what a trajectory is worth. Otherwise trainer.grpo.reward scores the text of the last turn.
        bounds_itself: it comes back in any case: instances are asked in the run's own process, from several threads at once.
            A subclass says so anew.
    """

    tools: ClassVar[Sequence[Mapping[str, Any]]] = ()
    row_keys: ClassVar[Collection[str] | None] = ()
    gives_reward: ClassVar[bool] = False
    bounds_itself: ClassVar[bool] = False

    def start(self, row: Mapping[str, Any]) -> Messages | str:
        """The prompt of a row: messages, or plain text. It depends on the row alone.

        Raises:
            ValueError: the row is none of this environment's.
        """
        for key in ("messages", "prompt"):
            if row.get(key) is not None:
                return row[key]
        raise ValueError("the row has neither prompt nor messages")

    def step(self, talk: Talk) -> Observation | End:
        """Answer the turn that has just ended. It is not asked about a turn that was cut off."""
        raise NotImplementedError

    def close(self) -> None:
        """The conversation is over, or given up: it ended, was cut off, or begins anew because a server has died."""

    def calls(self, text: str) -> list[ToolCall] | None:
        """Read the calls of tools in a turn's text, special tokens included; None: as the chat template writes them."""
        return None
