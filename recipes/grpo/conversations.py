"""The conversations of a step: environments that answer what was sampled, in token ids, and say what it was worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.rollouts import Passage, Trajectory, last_turn
from recipes.cli.named import describe
from recipes.data.rows import Prompt
from recipes.data.tokenizer import Tokenizer
from recipes.environments.environment import End, Environment, EnvironmentFailedError, Observation, Talk, Turn
from recipes.environments.registry import Named
from recipes.environments.rendering import answer_tokens
from recipes.environments.tool_calls import ToolFormat

__all__ = ["Conversations"]


class Conversations:
    """Of the samples of one prompt. It answers on the rank that is asked, and keeps its state there.

    Args:
        named: what makes the environments.
        prompt: of all of them.
        tools: how calls are written; None: the environment offers no tools, or reads them itself.
        max_turns: of a conversation; None: as many as its environment goes on for.
    """

    def __init__(
        self, named: Named, tokenizer: Tokenizer, prompt: Prompt, tools: ToolFormat | None, max_turns: int | None
    ):
        self.named, self.tokenizer, self.prompt, self.tools, self.max_turns = named, tokenizer, prompt, tools, max_turns
        self._open: dict[int, _Conversation] = {}

    def begin(self, sample: int) -> None:
        environment = self.named.make()
        self._call("start", environment.start, self.prompt.row)
        self._open[sample] = _Conversation(environment)

    def observe(self, sample: int, passages: Sequence[Passage]) -> tuple[int, ...] | None:
        open_ = self._open[sample]
        turn = self._turn(open_, passages)
        talk = Talk(self.prompt.row, (*open_.turns, turn))
        step = self._call("step", open_.environment.step, talk)
        if isinstance(step, End):
            open_.over = True
        elif not isinstance(step, Observation):
            raise EnvironmentFailedError(
                f"environment {self.named.name}: step gave {str(step)[:60]!r}: it must give an Observation or an End"
            )
        open_.reward += self._number(step.reward)
        if open_.over or len(talk.turns) == self.max_turns:
            open_.turns = talk.turns
            return None
        try:
            last = passages[-1].tokens[-1]
            tokens = answer_tokens(self.tokenizer, self.prompt.talk, talk.turns, step.answer, last)
        except UserError as error:
            raise EnvironmentFailedError(f"environment {self.named.name}: {error}") from error
        open_.turns = (*open_.turns, Turn(turn.text, turn.calls, step.answer))
        return tokens

    def reward(self, sample: int) -> float:
        """What the environment has given."""
        return self._open[sample].reward

    def answer(self, sample: int, trajectory: Trajectory) -> str:
        """The text that a reward scores: that of the last turn, and nothing where that one calls a tool."""
        open_ = self._open[sample]
        turn = open_.turns[-1] if open_.over else self._turn(open_, trajectory.passages)
        return "" if turn.calls and not open_.over else turn.text

    def _turn(self, open_: _Conversation, passages: Sequence[Passage]) -> Turn:
        """The last one that was sampled."""
        before, own = last_turn(passages)
        text = self.tokenizer.decode_response([*self.prompt.tokens, *before], own)
        whole = self.tokenizer.decode_whole(own)
        calls = self._call("calls", open_.environment.calls, whole)
        if calls is None:
            calls = [] if self.tools is None else self.tools.calls(whole, len(open_.turns))
        return Turn(text, tuple(calls))

    def _number(self, reward: Any) -> float:
        """0 for none."""
        if reward is None and not self.named.kind.gives_reward:
            return 0.0
        if not isinstance(reward, Real) or not math.isfinite(reward):
            raise EnvironmentFailedError(
                f"environment {self.named.name} gave the reward {str(reward)[:60]}; it must be a finite number"
            )
        return float(reward)

    def _call(self, name: str, method: Callable, argument: Any) -> Any:
        try:
            return method(argument)
        except Exception as error:
            raise EnvironmentFailedError(f"environment {self.named.name}: {name} failed: {describe(error)}") from error


class _Conversation:
    """One of them.

    Attributes:
        turns: that have been answered, and the last one where it is over.
        over: its environment has ended it.
    """

    def __init__(self, environment: Environment):
        self.environment = environment
        self.turns: tuple[Turn, ...] = ()
        self.reward, self.over = 0.0, False
