"""The servers of a run: who they are, which weights they have, and who answers which prompt.

Each update leaves a tag on every server, which no other update gives. A server that was started again has lost it: whatever it
has answered meanwhile is thrown away and asked for again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from megatron_ext.hf.gather import HostTensors
from megatron_ext.rollouts.requests import Request
from megatron_ext.rollouts.trajectories import Trajectory
from megatron_ext.rollouts.vllm.canary import Canary
from megatron_ext.rollouts.vllm.checks import Probe, check_canary, introduce
from megatron_ext.rollouts.vllm.client import BrokenError, Connection, opened, with_patience
from megatron_ext.rollouts.vllm.conversing import converse
from megatron_ext.rollouts.vllm.protocol import (
    GivenUpError,
    ServerCall,
    VllmError,
    as_calls,
    completion_body,
    in_order,
    read_completion,
)
from megatron_ext.rollouts.vllm.sender import NEEDED, Sender
from megatron_ext.vllm_servers import VllmOptions

__all__ = ["Fleet", "Weights"]

logger = logging.getLogger(__name__)

ROUNDS = 5  # in which servers that lost their weights are asked again
HEAD_START = 0.05  # seconds for the canary to be in the queue before what is in flight goes on
SHORT_PATIENCE = 5.0  # seconds, for one server while others answer


@dataclass(frozen=True)
class Weights:
    """
    Attributes:
        folder: of a Hugging Face model, which every server that is started can read; of weights=nccl without its weights.
        version: how many updates they have had.
        canary: what they say of a text.
        tensors: of weights=nccl, on rank 0.
    """

    folder: Path
    version: int
    canary: Canary
    tensors: HostTensors | None = None


class Fleet:
    """
    Args:
        options: of the servers.
        urls: where they are.
        key: for them.
        probe: what they must agree about.
        hopeless: why none of them will answer any more; None: they may.
        sender: of weights=nccl, on rank 0, which alone gives weights then.

    Attributes:
        names: by URL, what the server calls its model.
        tags: by URL, of the weights that it was given last.
        down: servers that are not asked now.
        run: what all tags of this run have in them.
        giving: held while weights are given, and by who changes them meanwhile.
    """

    def __init__(
        self,
        options: VllmOptions,
        urls: Sequence[str],
        key: str,
        probe: Probe,
        hopeless: Callable[[], str | None] = lambda: None,
        sender: Sender | None = None,
    ):
        self.options, self.urls, self.key, self.probe, self.hopeless = options, list(urls), key, probe, hopeless
        self.sender = sender
        self.names: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.down: set[str] = set()
        self.run = secrets.token_hex(8)
        self._newest: Weights | None = None
        self.giving = threading.RLock()
        self._served: set[str] = set()  # by whom weights have been taken before

    def introduce(self) -> None:
        """Wait until all servers answer, and see whether they can serve this run.

        Raises:
            VllmError: one cannot, or does not answer.
        """
        asyncio.run(self._with_all(self._introduce, self.urls, self.options.patience, must=True))

    def update(self, weights: Weights, in_flight: str = "abort") -> None:
        """Give all servers these weights; one that does not answer is left out until the next update, if another does.

        Args:
            in_flight: see `VllmOptions`.

        Raises:
            VllmError: none has them.
            WrongWeightsError: the canary died.
        """
        with self.giving:
            self._newest = weights
            asyncio.run(self._update(weights, in_flight))

    def mend(self) -> None:
        """Give the newest weights to servers that answer and have others, such as those that were started again.

        Raises:
            VllmError: one cannot take them.
            WrongWeightsError: the canary died.
        """
        with self.giving:
            asyncio.run(self._mend(self._newest))

    def version_of(self, tag: str) -> int | None:
        """How many updates the weights of this tag have had; None: this run has not given them."""
        version, _, rest = tag.partition(".")
        return int(version) if rest.partition(".")[0] == self.run else None

    def complete(self, requests: Sequence[Request], weights: Weights) -> list[list[Trajectory]]:
        """For each request its samples, in order, each from a server with these weights.

        Raises:
            VllmError: no server answers, or not what was asked.
            WrongWeightsError: the canary died on a server that was started again.
        """
        return asyncio.run(self._complete(list(requests), weights))

    async def _with_all(self, do: Callable, urls: Sequence[str], patience: float, must: bool, *arguments: Any) -> None:
        """Do something with many servers at once; those that do not answer are down, if not all `must`."""

        async def one(url: str) -> None:
            connection = Connection(http, url)
            await with_patience(patience, lambda _: do(connection, *arguments), self.hopeless)

        async with opened(self.key, self.options.timeout) as http:
            results = await asyncio.gather(*map(one, urls), return_exceptions=True)
        for url, result in zip(urls, results, strict=True):
            if result is None:
                self.down.discard(url)
            elif must or not isinstance(result, VllmError) or not isinstance(result.__cause__, GivenUpError):
                raise result
            else:
                self.down.add(url)
                logger.warning("%s is left out until the next update of the weights: %s", url, result)

    async def _introduce(self, server: Connection) -> None:
        self.names[server.url] = await introduce(server, self.probe)

    async def _update(self, weights: Weights, in_flight: str) -> None:
        if len(self.urls) > 1 and self.tags:
            await self._with_all(self._give, self.urls, SHORT_PATIENCE, False, weights, in_flight)
            if len(self.down) < len(self.urls):
                return
        await self._with_all(self._give, self.urls, self.options.patience, True, weights, in_flight)

    async def _mend(self, weights: Weights) -> None:
        async with opened(self.key, SHORT_PATIENCE) as http:
            tags = await asyncio.gather(*(self._tag(Connection(http, url)) for url in self.urls))
        lost = [
            url for url, tag in zip(self.urls, tags, strict=True) if tag and self.version_of(tag) != weights.version
        ]
        if lost:
            logger.warning("%s: it gets the newest weights, after it was away", ", ".join(lost))
            await self._with_all(self._give, lost, SHORT_PATIENCE, False, weights)

    async def _tag(self, server: Connection) -> str | None:
        """Of the weights that it has; None: it does not answer."""
        try:
            return str((await server.get("/weight_info"))["weight_version"])
        except GivenUpError:
            return None

    async def _give(self, server: Connection, weights: Weights, in_flight: str = "abort") -> None:
        """While the server is paused nothing is sampled. Requests in flight that are kept lose their keys and values, and are
        computed anew by the new weights: vLLM 0.32 puts them back in the queue."""
        try:
            await server.post(f"/pause?mode={in_flight}")
            await self._take(server, weights)
            cleared = await server.post("/reset_prefix_cache")
            if not cleared["success"]:
                raise GivenUpError(f"{server.url} did not clear its prefix cache")
            tag = f"{weights.version}.{self.run}.{secrets.token_hex(4)}"
            await server.post("/update_weight_version", {"new_version": tag})
            check = asyncio.ensure_future(check_canary(server, self.names[server.url], weights.canary, self.probe))
            try:
                await asyncio.sleep(HEAD_START)
                await server.post("/resume")
                await check
            finally:
                check.cancel()
        except BrokenError as error:
            if await server.is_healthy():
                raise VllmError(
                    f"{server.url} cannot take the weights of {weights.version} updates: {error}"
                ) from error
            raise
        self._served.add(server.url)
        self.tags[server.url] = tag

    async def _take(self, server: Connection, weights: Weights) -> None:
        """vLLM 0.32 ends where it cannot load a folder. If it never took weights of this run, it never will."""
        try:
            if self.sender is not None:
                label = str((await server.get("/weight_info"))["weight_version"])
                await self.sender.send(server, weights.tensors, label, self.tags.get(server.url))
            else:
                body = {"method": "reload_weights", "kwargs": {"weights_path": str(weights.folder)}}
                await server.post("/collective_rpc", body)
        except GivenUpError as error:
            if server.url in self._served:
                raise
            needed = f"can it read {weights.folder}" if self.sender is None else NEEDED
            raise VllmError(
                f"{server.url} has failed to load the weights: {needed}, and does it serve this run's model? Its log says more "
                f"({error})"
            ) from error

    async def _renew(self, server: Connection, weights: Weights) -> None:
        """For a server that has lost its weights. Where rank 0 alone has them, its `Keeper` gives them meanwhile."""
        if self.options.weights == "folder":
            await self._give(server, weights)
            return
        tag = await self._tag(server)
        if tag is None or self.version_of(tag) != weights.version:
            raise GivenUpError(f"{server.url} has not got the newest weights again yet")
        self.tags[server.url] = tag

    async def _complete(self, requests: list[Request], weights: Weights) -> list[list[Trajectory]]:
        calls = list(as_calls(requests))
        found: dict[int, list[Trajectory]] = {}
        for _ in range(ROUNDS):
            todo = [i for i in range(len(calls)) if i not in found]
            tags = dict(self.tags)  # a `Keeper` may give others meanwhile
            async with opened(self.key, self.options.timeout) as http:
                answers = await asyncio.gather(*(self._conversations(http, calls[i], weights) for i in todo))
                used = sorted(set().union(*(urls for urls, _ in answers)))
                kept = await asyncio.gather(*(self._still_has(Connection(http, url), weights, tags) for url in used))
            trusted = {url for url, is_kept in zip(used, kept, strict=True) if is_kept}
            found |= {i: samples for i, (urls, samples) in zip(todo, answers, strict=True) if urls <= trusted}
            if len(found) == len(calls):
                return in_order(requests, calls, [found[i] for i in range(len(calls))])
            logger.warning(
                "%s has been started again: %d of %d answers are asked for once more",
                ", ".join(sorted(set(used) - trusted)), len(calls) - len(found), len(calls),
            )  # fmt: skip
            lost = [url for url in used if url not in trusted and url not in self.tags]
            others = len(self.urls) > len(lost)
            await self._with_all(
                self._renew, lost, SHORT_PATIENCE if others else self.options.patience, not others, weights
            )
        raise VllmError(f"servers lost their weights {ROUNDS} times while they sampled one step: see their logs")

    async def _conversations(
        self, http: httpx.AsyncClient, call: ServerCall, weights: Weights
    ) -> tuple[set[str], list[Trajectory]]:
        """Who has answered, and what each sample says and observes to its end."""
        used: set[str] = set()

        async def turn(call: ServerCall) -> list[Trajectory]:
            url, samples = await self._answer(http, call, weights)
            used.add(url)
            return samples

        return used, await converse(call, turn)

    async def _answer(
        self, http: httpx.AsyncClient, call: ServerCall, weights: Weights
    ) -> tuple[str, list[Trajectory]]:
        """Who has answered, and what."""

        async def attempt(failures: int) -> tuple[str, list[Trajectory]]:
            up = [url for url in self.urls if url not in self.down] or self.urls
            server = Connection(http, up[(call.number + failures) % len(up)])
            body = completion_body(self.names[server.url], call)
            answer = await server.post("/v1/completions", body)
            try:
                return server.url, read_completion(answer, call, weights.version, self.probe.routes)
            except VllmError as error:
                raise VllmError(f"{server.url}: {error}") from error

        return await with_patience(self.options.patience, attempt, self.hopeless)

    async def _still_has(self, server: Connection, weights: Weights, tags: dict[str, str]) -> bool:
        """Whether a server has had the same weights since it had these tags. If not, it needs them, unless a peer has given them
        to it."""
        tag = await self._tag(server)
        if tag is not None and tag == tags.get(server.url):
            return True
        self.tags.pop(server.url, None)
        if tag and tag.startswith(f"{weights.version}."):
            self.tags[server.url] = tag
        return False
