"""Conversations through a server: turn by turn, token in, token out; what was said before is in its prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from megatron_ext.errors import UserError
from megatron_ext.rollouts.observing import THREADS
from megatron_ext.rollouts.responses import NO_TOKENS, TURN_ENDS
from megatron_ext.rollouts.trajectories import FinishReason, Passage, Trajectory
from megatron_ext.rollouts.vllm.protocol import ServerCall

__all__ = ["converse"]

Ask = Callable[[ServerCall], Awaitable[list[Trajectory]]]


async def converse(call: ServerCall, ask: Ask) -> list[Trajectory]:
    """What each sample of a call says to its end, with what its environment answers in between.

    Args:
        ask: a turn of each sample, behind `call.said`.

    Raises:
        UserError: of the environment, or of `ask`.
    """
    environment = call.request.environment
    if environment is None:
        return await ask(call)
    ask_environment = partial(asyncio.get_running_loop().run_in_executor, THREADS)
    await asyncio.gather(*(ask_environment(environment.begin, sample) for sample in call.samples))
    first = await ask(call)
    rest = (_go_on(call, sample, turn, ask) for sample, turn in zip(call.samples, first, strict=True))
    return list(await asyncio.gather(*rest))


async def _go_on(call: ServerCall, sample: int, turn: Trajectory, ask: Ask) -> Trajectory:
    """The conversation of one sample, whose first turn is there."""
    environment, passages = call.request.environment, list(turn.passages)
    while turn.finish_reason in TURN_ENDS:
        seen = await asyncio.get_running_loop().run_in_executor(THREADS, environment.observe, sample, tuple(passages))
        if seen is None:
            break
        if not seen:
            raise UserError(NO_TOKENS)
        said = tuple(token for passage in passages for token in passage.tokens)
        if len(said) + len(seen) >= call.limit:
            return Trajectory(passages, FinishReason.LENGTH, turn.routes)
        passages.append(Passage(seen))
        left = call.limit - len(said) - len(seen)
        (turn,) = await ask(replace(call, samples=(sample,), said=(*said, *seen), limit=left))
        passages += turn.passages
    return Trajectory(passages, turn.finish_reason, turn.routes)  # the last turn's are of all before it, too
