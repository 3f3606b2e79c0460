"""Requests in flight: sampled by servers while this process does other things, across updates of the weights.

A thread of its own holds the connections. What a server has told of a response is kept, whatever ends it: the rest is asked for
in a new request, token in, token out.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import httpx

from megatron_ext.rollouts.requests import Request
from megatron_ext.rollouts.responses import Decode, Response
from megatron_ext.rollouts.trajectories import FinishReason, Trajectory
from megatron_ext.rollouts.vllm.client import CONNECTIONS, Connection, opened, with_patience
from megatron_ext.rollouts.vllm.conversing import converse
from megatron_ext.rollouts.vllm.fleet import Fleet
from megatron_ext.rollouts.vllm.protocol import GivenUpError, ServerCall, VllmError, as_calls, in_order
from megatron_ext.rollouts.vllm.spans import FIRST, ROUTE, generate_body, read_generated

__all__ = ["Flight", "Keeper"]

PAUSE = 2.0  # seconds between looks at the servers


@dataclass(frozen=True)
class Terms:
    """See `Flight.begin`."""

    oldest: int
    priority: int


class Flight:
    """What one rank has asked for and not yet got.

    Args:
        fleet: who is asked. Another thread may give them weights meanwhile.
        decode: for stop strings.
        first: the place among the servers at which this rank begins, so that not all begin at the same.
    """

    def __init__(self, fleet: Fleet, decode: Decode | None = None, first: int = 0):
        self.fleet, self.decode, self.first = fleet, decode, first
        self._load: Counter[str] = Counter()  # samples that each server has yet to give
        self._loop = asyncio.new_event_loop()
        self._turns = Turns(CONNECTIONS)
        self._http: httpx.AsyncClient | None = None
        self._thread = threading.Thread(target=self._run, name="rollouts in flight", daemon=True)
        self._thread.start()

    def begin(self, requests: Sequence[Request], oldest: int, priority: int = FIRST) -> Future[list[list[Trajectory]]]:
        """Ask for the samples of each request, in order.

        Args:
            oldest: no token is of weights with fewer updates.
            priority: where there is not room for all, here or in the server, lower numbers come first.

        Returns:
            A future, which raises VllmError where no server answers, or not what was asked.
        """
        return asyncio.run_coroutine_threadsafe(self._all(list(requests), Terms(oldest, priority)), self._loop)

    def close(self) -> None:
        """Give up whatever is in flight."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            if self._http is not None:
                self._loop.run_until_complete(self._http.aclose())
            self._loop.close()

    async def _all(self, requests: list[Request], terms: Terms) -> list[list[Trajectory]]:
        if self._http is None:
            self._http = opened(self.fleet.key, self.fleet.options.timeout)
        calls = list(as_calls(requests))
        homes = [self._home(request) for request in requests]
        tasks = [asyncio.ensure_future(self._conversations(call, homes[call.number], terms)) for call in calls]
        try:
            return in_order(requests, calls, await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            for home, request in zip(homes, requests, strict=True):
                self._load[home] -= request.samples

    def _home(self, request: Request) -> str:
        """The server that has least to do for this rank: it gets all samples of a prompt."""
        urls = self.fleet.urls
        turned = [urls[(self.first + i) % len(urls)] for i in range(len(urls))]
        home = min([url for url in turned if url not in self.fleet.down] or turned, key=self._load.__getitem__)
        self._load[home] += request.samples
        return home

    async def _conversations(self, call: ServerCall, home: str, terms: Terms) -> list[Trajectory]:
        """What each sample of a call says and observes to its end."""

        async def turn(call: ServerCall) -> list[Trajectory]:
            parts = await self._samples(call, home, terms)
            return [self._cut(call, sample, part) for sample, part in zip(call.samples, parts, strict=True)]

        return await converse(call, turn)

    async def _samples(self, call: ServerCall, home: str, terms: Terms) -> list[Trajectory]:
        """What each sample of a call says to its end, behind `call.said`."""
        found = dict(zip(call.samples, await self._ask(call, home, terms), strict=True))
        silent = tuple(sample for sample, part in found.items() if not part.passages)
        rest = [replace(call, samples=silent)] if silent else []
        rest += [
            replace(call, samples=(sample,), said=(*call.said, *part.tokens), limit=call.limit - len(part))
            for sample, part in found.items()
            if part.finish_reason is FinishReason.ABORTED and part.passages
        ]
        tails = await asyncio.gather(*(self._samples(next_call, home, terms) for next_call in rest))
        for next_call, parts in zip(rest, tails, strict=True):
            for sample, part in zip(next_call.samples, parts, strict=True):
                passages = (*found[sample].passages, *part.passages)
                found[sample] = Trajectory(passages, part.finish_reason, part.routes)
        return list(found.values())

    async def _ask(self, call: ServerCall, home: str, terms: Terms) -> list[Trajectory]:
        """One HTTP request, tried until it is answered."""

        async def attempt(failures: int) -> list[Trajectory]:
            up = [url for url in self.fleet.urls if url not in self.fleet.down] or self.fleet.urls
            place = up.index(home) if home in up else 0
            server = Connection(self._http, up[(place + failures) % len(up)])
            answer = await server.post(ROUTE, generate_body(self.fleet.names[server.url], call, terms.priority))
            try:
                parts = read_generated(answer, call, self.fleet.version_of, self.fleet.probe.routes)
            except VllmError as error:
                raise VllmError(f"{server.url}: {error}") from error
            if any(passage.weight_version < terms.oldest for part in parts for passage in part.passages):
                raise GivenUpError(f"{server.url} has sampled with weights of too long ago")
            return parts

        async with self._turns.turn(terms.priority):
            return await with_patience(self.fleet.options.patience, attempt, self.fleet.hopeless)

    def _cut(self, call: ServerCall, sample: int, turn: Trajectory) -> Trajectory:
        """Where two requests have said a stop string together, no server has seen it: the turn ends there."""
        if not call.request.params.stop_strings or len(turn.passages) < 2:
            return turn
        response = Response(call.request, sample, self.decode, call.said)
        for token, logprob in zip(turn.tokens, turn.logprobs, strict=True):
            response.add(token, logprob)
            if response.finish_reason is FinishReason.STOP_STRING:
                return _beginning(turn, len(response.tokens) - len(call.said))
        return turn


def _beginning(whole: Trajectory, length: int) -> Trajectory:
    """So many tokens of a trajectory, which a stop string ends."""
    passages, left_out = [], len(whole) - length
    for passage in whole.passages:
        tokens, logprobs = passage.tokens[:length], passage.logprobs[:length]
        length -= len(tokens)
        if tokens:
            passages.append(replace(passage, tokens=tokens, logprobs=logprobs))
    routes = None if whole.routes is None else whole.routes[: len(whole.routes) - left_out]
    return Trajectory(passages, FinishReason.STOP_STRING, routes)


class Turns:
    """So many at a time; of those that wait the lowest `rank` is next, then who has waited longest."""

    def __init__(self, count: int):
        self._free = count
        self._waiting: list[tuple[int, int, asyncio.Future]] = []
        self._numbers = itertools.count()

    @asynccontextmanager
    async def turn(self, rank: int) -> AsyncIterator[None]:
        mine = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._numbers), mine))
        self._next()
        try:
            await mine
            yield
        finally:
            if not mine.cancelled():
                self._free += 1
                self._next()

    def _next(self) -> None:
        while self._free and self._waiting:
            *_, waiting = heapq.heappop(self._waiting)
            if not waiting.done():
                waiting.set_result(None)
                self._free -= 1


class Keeper:
    """Sees to it that servers which were away get the newest weights between updates, in a thread of its own. One rank has one:
    two that give weights to one server at a time would mix them."""

    def __init__(self, fleet: Fleet):
        self.fleet = fleet
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="servers' weights", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            Exception: why a server could not get its weights.
        """
        if self._error is not None:
            raise self._error

    @property
    def failure(self) -> str | None:
        """What `check` raises, in words; None: nothing."""
        return None if self._error is None else str(self._error)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(PAUSE):
            try:
                self.fleet.mend()
            except Exception as error:  # noqa: BLE001  whatever it was, `check` tells the run
                self._error = error
                return
