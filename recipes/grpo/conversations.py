"""The conversations of a step: environments that answer what was sampled, in token ids, and say what it was worth."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.rollouts import Passage, Trajectory, last_turn
from recipes.cli.named import describe
from recipes.data.conversation import read_conversation
from recipes.data.rows import Prompt
from recipes.data.tokenizer import Tokenizer
from recipes.environments.environment import (
    End,
    Environment,
    EnvironmentFailedError,
    EnvironmentLostError,
    Observation,
    ToolCall,
    Turn,
)
from recipes.environments.processes import Begun, Environments
from recipes.environments.registry import Named
from recipes.environments.rendering import answer_tokens
from recipes.environments.tool_calls import ToolFormat, call_id

__all__ = ["Conversations", "check_template", "tool_format"]

logger = logging.getLogger(__name__)


def tool_format(environment: Named | None, tokenizer: Tokenizer) -> ToolFormat | None:
    """How calls of its tools are written; None: it has none, or reads them itself.

    Raises:
        DataError: the chat template writes them in a form that is not known.
    """
    if environment is None or not environment.kind.tools or type(environment.kind).calls is not Environment.calls:
        return None
    return ToolFormat.of(tokenizer.template)


def check_template(
    environment: Named | None, tokenizer: Tokenizer, prompt: Prompt | None, ends: Collection[int]
) -> None:
    """See, before anything is sampled, that the chat template can write calls and answers.

    Args:
        prompt: one of the run's.

    Raises:
        DataError: it cannot.
    """
    tool_format(environment, tokenizer)
    if environment is None or prompt is None or prompt.talk is None:
        return
    turn, answer = Turn("a"), [{"role": "user", "content": "a"}]
    if environment.kind.tools:
        call = ToolCall("a", {}, call_id(0, 0))
        turn, answer = Turn("a", (call,)), [call.result("a")]
    answer_tokens(tokenizer, prompt.talk, [turn], answer, tokenizer.eos_id, ends or tokenizer.stop_ids)


class Conversations:
    """Of the samples of one prompt. It answers on the rank that is asked, and keeps its state there.

    Args:
        environments: what they are begun with.
        prompt: of all of them.
        tools: how calls are written; None: the environment offers no tools, or reads them itself.
        ends: tokens that end turns.
        max_turns: of a conversation; None: as many as its environment goes on for.
        on_timeout: what becomes of a conversation whose environment is lost, as trainer.grpo.on_reward_timeout.
        key: of its request, which random numbers of environments are drawn from, beside the sample's number.
    """

    def __init__(
        self,
        environments: Environments,
        tokenizer: Tokenizer,
        prompt: Prompt,
        tools: ToolFormat | None,
        ends: Collection[int],
        max_turns: int | None,
        on_timeout: str = "refuse",
        key: tuple[int, ...] = (0,),
    ):
        self.environments, self.named = environments, environments.named
        self.tokenizer, self.prompt, self.tools = tokenizer, prompt, tools
        self.ends, self.max_turns, self.on_timeout, self.key = ends or tokenizer.stop_ids, max_turns, on_timeout, key
        self._open: dict[int, _Conversation] = {}

    def begin(self, sample: int) -> None:
        self.end(sample)
        open_ = self._open[sample] = _Conversation(self.environments.begin(self.prompt.where, (*self.key, sample)))
        content = self._in_time(open_, lambda: open_.environment.ask("start", self.prompt.row))
        if open_.lost or type(self.named.kind).start is Environment.start or self._is_prompt(content):
            return
        raise EnvironmentFailedError(
            f"environment {self.named.name}: start gave another prompt for {self.prompt.where} than when rows were read: "
            "it must depend on the row alone"
        )

    def end(self, sample: int) -> None:
        """It is over, if it has begun."""
        open_ = self._open.pop(sample, None)
        if open_ is None or open_.lost:
            return
        try:
            self._in_time(open_, lambda: open_.environment.ask("close", None))
        finally:
            open_.environment.end()

    def _in_time(self, open_: _Conversation, ask: Callable[[], Any]) -> Any:
        """What is asked of an environment; None where it is lost, and such a conversation is given up."""
        try:
            return ask()
        except EnvironmentLostError as error:
            if self.on_timeout == "refuse":
                raise
            open_.lost = True
            logger.warning("%s: the conversation is given up", error)
            return None

    def _is_prompt(self, content: Any) -> bool:
        if isinstance(content, str):
            return tuple(self.tokenizer.encode_prompt(content)) == self.prompt.tokens
        found = read_conversation({"messages": [*content]}, (), "the prompt").messages
        return self.prompt.talk is not None and found == self.prompt.talk.messages

    def observe(self, sample: int, passages: Sequence[Passage]) -> tuple[int, ...] | None:
        open_ = self._open[sample]
        if open_.lost:
            return None
        try:
            return self._in_time(open_, lambda: self._observe(open_, passages))
        except EnvironmentFailedError:
            raise
        except Exception as error:  # of whatever it gave
            said = str(error) if isinstance(error, UserError) else describe(error)
            raise EnvironmentFailedError(f"environment {self.named.name}: {said}") from error

    def _observe(self, open_: _Conversation, passages: Sequence[Passage]) -> tuple[int, ...] | None:
        turn = self._turn(open_, passages)
        turns = (*open_.turns, turn)
        step = open_.environment.ask("step", turns)
        if isinstance(step, End):
            open_.over = True
        elif not isinstance(step, Observation):
            raise EnvironmentFailedError(
                f"environment {self.named.name}: step gave {str(step)[:60]!r}: it must give an Observation or an End"
            )
        open_.reward += self._number(step.reward)
        if open_.over or len(turns) == self.max_turns:
            open_.turns = turns
            return None
        last = passages[-1].tokens[-1]
        tokens = answer_tokens(self.tokenizer, self.prompt.talk, turns, step.answer, last, self.ends)
        open_.turns = (*open_.turns, Turn(turn.text, turn.calls, step.answer))
        return tokens

    def reward(self, sample: int) -> float:
        """What the environment has given; of one that is lost 0, or NaN where such are dropped."""
        open_ = self._open[sample]
        return (math.nan if self.on_timeout == "drop" else 0.0) if open_.lost else open_.reward

    def lost(self, sample: int) -> bool:
        """Whether the environment has not answered in time, or has ended its process."""
        return self._open[sample].lost

    def answer(self, sample: int, trajectory: Trajectory) -> str:
        """The text that a reward scores: that of the last turn, and nothing where that one calls a tool, or was not answered."""
        open_ = self._open[sample]
        turn = open_.turns[-1] if open_.over else None
        if turn is None and not open_.lost:
            turn = self._in_time(open_, lambda: self._turn(open_, trajectory.passages))
        if open_.lost:
            return ""
        return "" if turn.calls and not open_.over else turn.text

    def _turn(self, open_: _Conversation, passages: Sequence[Passage]) -> Turn:
        """The last one that was sampled."""
        before, own = last_turn(passages)
        text = self.tokenizer.decode_response([*self.prompt.tokens, *before], own)
        whole = self.tokenizer.decode_whole(own)
        own_reader = type(self.named.kind).calls is not Environment.calls
        calls = open_.environment.ask("calls", whole) if own_reader else None
        if calls is None:
            # A call without a marker is all of the text; special tokens may stand before it.
            form, said = self.tools, whole if self.tools and self.tools.marker else text
            calls = [] if form is None else form.calls(said, len(open_.turns))
        if not all(isinstance(call, ToolCall) for call in calls):
            raise EnvironmentFailedError(f"environment {self.named.name}: calls must give a list of ToolCall, or None")
        return Turn(text, tuple(calls))

    def _number(self, reward: Any) -> float:
        """0 for none."""
        if reward is None and not self.named.kind.gives_reward:
            return 0.0
        try:
            finite = isinstance(reward, Real) and math.isfinite(reward)
        except OverflowError:
            finite = False
        if not finite:
            raise EnvironmentFailedError(
                f"environment {self.named.name} gave the reward {str(reward)[:60]}; it must be a finite number"
            )
        return float(reward)


class _Conversation:
    """One of them.

    Attributes:
        turns: that have been answered, and the last one where it is over.
        over: its environment has ended it.
        lost: its environment has not answered in time, or has ended its process.
    """

    def __init__(self, environment: Begun):
        self.environment = environment
        self.turns: tuple[Turn, ...] = ()
        self.reward, self.over, self.lost = 0.0, False, False
