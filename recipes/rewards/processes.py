"""Rewards in processes of their own, which are killed when one does not come back.

A process makes its rewards again from what the configuration says, keeps them, and is asked for the responses to one prompt at a
time. Its limit begins when it begins with a call; the time that it needs to start is none of it. It leads a group, which is
killed after it: with what its rewards have started.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import psutil
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from recipes.cli.children import ending, group_dies_with, leave_signals
from recipes.rewards.asking import NobodyWaitsError, asker
from recipes.rewards.registry import NamedReward, RewardError, get_reward, is_async, score, score_async

__all__ = ["Lost", "PromptCall", "RewardProcesses"]

START_SECONDS = 600.0  # in which a process must have imported what its rewards need
LOOK_SECONDS = 0.5  # between looks at whether somebody waits
GRACE_SECONDS = 5.0  # beyond its limit, for an async reward to give up by itself


@dataclass(frozen=True)
class PromptCall:
    """The responses to one prompt, its row, and the row's file and line, if they are known."""

    responses: tuple[str, ...]
    row: dict
    where: str | None = None

    def each(self) -> list[PromptCall]:
        """One for each response."""
        return [PromptCall((text,), self.row, self.where) for text in self.responses]

    @property
    def arguments(self) -> tuple[Sequence[str], list[dict], list[str] | None]:
        count = len(self.responses)
        return self.responses, [self.row] * count, None if self.where is None else [self.where] * count


@dataclass(frozen=True)
class Lost:
    """A call without an answer, and why."""

    reason: str


Answer = list[float | None] | Lost


class RewardProcesses:
    """
    Args:
        rewards: that may be asked, by their number.
        limit: seconds for a call.
        count: processes. Each has all rewards; they start when they are first asked.
    """

    def __init__(self, rewards: Sequence[NamedReward], limit: float, count: int):
        self._rewards, self._limit, self._count = rewards, limit, count
        self._pool: ProcessPool | None = None
        self._groups: set[int] = set()

    def ask(self, number: int, calls: Sequence[PromptCall]) -> Iterator[Answer]:
        """Of each call, in order, as many numbers as it has responses, or what became of it.

        Raises:
            RewardError: the reward failed; all that was asked is given up.
            NobodyWaitsError: so is what nobody waits for.
        """
        if is_async(self._rewards[number]) and len(calls) > 1:
            yield from self._ask_at_once(number, calls)
            return
        futures = [self._schedule(_answer, number, call, limit=self._limit) for call in calls]
        try:
            for future in futures:
                yield self._result(future, number)
        finally:
            if not all(future.done() for future in futures):
                self.close()

    def _ask_at_once(self, number: int, calls: Sequence[PromptCall]) -> Iterator[Answer]:
        """Coroutines together. Where one keeps the others from coming back, each is asked by itself."""
        future = self._schedule(_answer_all, number, calls, self._limit, limit=self._limit + GRACE_SECONDS)
        try:
            found = self._result(future, number)
        except (RewardError, NobodyWaitsError):
            self.close()
            raise
        if not isinstance(found, Lost):
            yield from found
            return
        for call in calls:
            yield from self.ask(number, [call])

    def close(self) -> None:
        """End the processes, whatever they do."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None
            self._kill_groups()
            self._heard.close()
            self._tell.close()

    def _kill_groups(self) -> None:
        """Of processes that have ended, what they have started."""
        while not self._heard.closed and self._heard.poll():
            self._groups.add(int(self._heard.recv_bytes()))
        for leader in [each for each in self._groups if not _runs(each)]:
            self._groups.remove(leader)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)

    def _schedule(self, function, *arguments, limit: float) -> ProcessFuture:
        if self._pool is None or not self._pool.active:
            self.close()
            specs = [
                None if r.bounds_itself else (r.spec, r.key, getattr(r.target, "__module__", None))
                for r in self._rewards
            ]
            # Not forked: CUDA and threads survive no fork.
            context = multiprocessing.get_context("spawn")
            self._heard, self._tell = context.Pipe(duplex=False)
            self._pool = ProcessPool(self._count, context=context, initializer=_begin, initargs=(specs, self._tell))
        return self._pool.schedule(function, args=arguments, timeout=limit)

    def _result(self, future: ProcessFuture, number: int):
        """Calls before this one have been answered, and begun in order: what is left may take a start and two limits."""
        name = self._rewards[number].name
        patience = START_SECONDS + 2 * (self._limit + GRACE_SECONDS)
        deadline = time.monotonic() + patience
        try:
            while not future.done() and time.monotonic() < deadline:
                asker().check()
                concurrent.futures.wait([future], timeout=LOOK_SECONDS)
            return future.result(timeout=0)
        except TimeoutError as error:
            if not future.done():
                raise RewardError(f"reward {name}: its process has not started in {patience:g} s") from error
            self._kill_groups()
            return Lost(f"has not come back within trainer.grpo.reward_timeout={self._limit:g} s")
        except ProcessExpired as error:
            self._kill_groups()
            return Lost(f"ended its process ({ending(error.exitcode)})")
        except BrokenProcessPool as error:
            raise RewardError(
                f"reward {name}: its processes have ended, and none was at work: were they killed?"
            ) from error


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# In the process.

_rewards: list[NamedReward | None] = []
_failure: str | None = None


def _begin(specs: Sequence[tuple | None], tell: multiprocessing.connection.Connection) -> None:
    """
    Args:
        specs: what rewards are made of; None: one that is not asked here.
        tell: hears which group this is.
    """
    global _failure
    os.setsid()
    tell.send_bytes(str(os.getpid()).encode())  # in one piece: several write to it
    leave_signals()
    group_dies_with(multiprocessing.parent_process().sentinel)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        for each in specs:
            _rewards.append(None if each is None else _made(*each))
    except Exception as error:  # noqa: BLE001  it must be told when it is asked
        _failure = f"{type(error).__name__}: {error}"


def _made(spec: Any, key: str, module: str | None) -> NamedReward:
    if module:  # which may give it its name
        importlib.import_module(module)
    reward = get_reward(spec, key)
    if hasattr(reward.target, "prepare"):
        reward.target.prepare()
    return reward


def _reward(number: int) -> NamedReward:
    if _failure is not None:
        raise RewardError(f"in its own process a reward cannot be made: {_failure}")
    return _rewards[number]


def _answer(number: int, call: PromptCall) -> list[float | None]:
    return score(_reward(number), *call.arguments)


def _answer_all(number: int, calls: Sequence[PromptCall], limit: float) -> list[Answer]:
    async def one(first: int, call: PromptCall) -> Answer:
        try:
            async with asyncio.timeout(limit):
                return await score_async(_reward(number), *call.arguments)
        except TimeoutError:
            return Lost(f"has not come back within trainer.grpo.reward_timeout={limit:g} s")
        except RewardError as error:
            error.index = first
            raise

    async def all_of_them() -> list[Answer]:
        firsts = itertools.accumulate((len(call.responses) for call in calls[:-1]), initial=0)
        return await asyncio.gather(*map(one, firsts, calls))

    return asyncio.run(all_of_them())
