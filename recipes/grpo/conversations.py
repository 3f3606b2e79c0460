"""The conversations of a step: environments that answer what was sampled, in token ids, and say what it was worth."""

from __future__ import annotations

import copy
import logging
import math
import threading
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
    Observation,
    Talk,
    ToolCall,
    Turn,
)
from recipes.environments.registry import Named
from recipes.environments.rendering import answer_tokens
from recipes.environments.tool_calls import ToolFormat, call_id

__all__ = ["Conversations", "check_template", "tool_format"]

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds, for one call of an environment, before the log says that it is waited for
SLOW = "environment %s: %s has not come back for %.0f s, for the prompt of %s"


def tool_format(environment: Named | None, tokenizer: Tokenizer) -> ToolFormat | None:
    """How calls of its tools are written; None: it has none, or reads them itself.

    Raises:
        DataError: the chat template writes them in a form that is not known.
    """
    if environment is None or not environment.kind.tools or type(environment.kind).calls is not Environment.calls:
        return None
    return ToolFormat.of(tokenizer.template)


def check_template(
    environment: Named | None, tokenizer: Tokenizer, prompts: Sequence[Prompt], ends: Collection[int]
) -> None:
    """See, before anything is sampled, that the chat template can write calls and answers.

    Raises:
        DataError: it cannot.
    """
    tool_format(environment, tokenizer)
    if environment is None or not prompts or prompts[0].talk is None:
        return
    turn, answer = Turn("a"), [{"role": "user", "content": "a"}]
    if environment.kind.tools:
        call = ToolCall("a", {}, call_id(0, 0))
        turn, answer = Turn("a", (call,)), [call.result("a")]
    answer_tokens(tokenizer, prompts[0].talk, [turn], answer, tokenizer.eos_id, ends or tokenizer.stop_ids)


class Conversations:
    """Of the samples of one prompt. It answers on the rank that is asked, and keeps its state there.

    Args:
        named: what makes the environments.
        prompt: of all of them.
        tools: how calls are written; None: the environment offers no tools, or reads them itself.
        ends: tokens that end turns.
        max_turns: of a conversation; None: as many as its environment goes on for.
    """

    def __init__(
        self,
        named: Named,
        tokenizer: Tokenizer,
        prompt: Prompt,
        tools: ToolFormat | None,
        ends: Collection[int],
        max_turns: int | None,
    ):
        self.named, self.tokenizer, self.prompt, self.tools = named, tokenizer, prompt, tools
        self.ends, self.max_turns = ends or tokenizer.stop_ids, max_turns
        self._open: dict[int, _Conversation] = {}

    def begin(self, sample: int) -> None:
        self._close(sample)
        environment, row = self.named.make(), copy.deepcopy(self.prompt.row)
        content = self._call("start", environment.start, row)
        if type(environment).start is not Environment.start and not self._is_prompt(content):
            raise EnvironmentFailedError(
                f"environment {self.named.name}: start gave another prompt for {self.prompt.where} than when rows were read: "
                "it must depend on the row alone"
            )
        self._open[sample] = _Conversation(environment, row)

    def close(self) -> None:
        """All of them are over."""
        for sample in list(self._open):
            self._close(sample)

    def _close(self, sample: int) -> None:
        if open_ := self._open.pop(sample, None):
            self._call("close", lambda _: open_.environment.close(), None)

    def _is_prompt(self, content: Any) -> bool:
        if isinstance(content, str):
            return tuple(self.tokenizer.encode_prompt(content)) == self.prompt.tokens
        found = read_conversation({"messages": [*content]}, (), "the prompt").messages
        return self.prompt.talk is not None and found == self.prompt.talk.messages

    def observe(self, sample: int, passages: Sequence[Passage]) -> tuple[int, ...] | None:
        try:
            return self._observe(self._open[sample], passages)
        except EnvironmentFailedError:
            raise
        except Exception as error:  # of whatever it gave
            said = str(error) if isinstance(error, UserError) else describe(error)
            raise EnvironmentFailedError(f"environment {self.named.name}: {said}") from error

    def _observe(self, open_: _Conversation, passages: Sequence[Passage]) -> tuple[int, ...] | None:
        turn = self._turn(open_, passages)
        talk = Talk(open_.row, (*open_.turns, turn))
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
        last = passages[-1].tokens[-1]
        tokens = answer_tokens(self.tokenizer, self.prompt.talk, talk.turns, step.answer, last, self.ends)
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

    def _call(self, name: str, method: Callable, argument: Any) -> Any:
        waiting = threading.Timer(PATIENCE, logger.warning, (SLOW, self.named.name, name, PATIENCE, self.prompt.where))
        waiting.daemon = True
        waiting.start()
        try:
            return method(argument)
        except (Exception, SystemExit) as error:
            raise EnvironmentFailedError(f"environment {self.named.name}: {name} failed: {describe(error)}") from error
        finally:
            waiting.cancel()


class _Conversation:
    """One of them.

    Attributes:
        row: a copy of its own.
        turns: that have been answered, and the last one where it is over.
        over: its environment has ended it.
    """

    def __init__(self, environment: Environment, row: dict[str, Any]):
        self.environment, self.row = environment, row
        self.turns: tuple[Turn, ...] = ()
        self.reward, self.over = 0.0, False
