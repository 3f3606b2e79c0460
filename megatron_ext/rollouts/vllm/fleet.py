"""The servers of a run: who they are, which weights they have, and who answers which prompt.

Each update leaves a tag on every server, which no other update gives. A server that was started again has lost it: whatever it
has answered meanwhile is thrown away and asked for again.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from megatron_ext.errors import DivergedError
from megatron_ext.rollouts.requests import Request
from megatron_ext.rollouts.trajectories import Trajectory
from megatron_ext.rollouts.vllm.canary import TEMPERATURE, Canary
from megatron_ext.rollouts.vllm.client import BrokenError, Connection, opened, with_patience
from megatron_ext.rollouts.vllm.options import VllmOptions
from megatron_ext.rollouts.vllm.protocol import (
    GivenUpError,
    ServerCall,
    VllmError,
    as_calls,
    completion_body,
    read_completion,
)

__all__ = ["OLDEST_VLLM", "Fleet", "Probe", "Weights", "WrongWeightsError"]

logger = logging.getLogger(__name__)

OLDEST_VLLM = (0, 32)  # older ones have not been tried, and have no tags on their weights
ROUNDS = 5  # in which servers that lost their weights are asked again
SHORT_PATIENCE = 5.0  # seconds, for one server while others answer


class WrongWeightsError(DivergedError):
    """A server's weights are not those that are trained."""


@dataclass(frozen=True)
class Weights:
    """
    Attributes:
        folder: of a Hugging Face model, which every server can read.
        version: how many updates they have had.
        canary: what they say of a text.
    """

    folder: Path
    version: int
    canary: Canary


@dataclass(frozen=True)
class Probe:
    """What a server must agree about.

    Attributes:
        text, ids: the tokenizer's, without special tokens.
        max_length: tokens of prompt and response.
        tolerance: of the canary, in nats.
    """

    text: str
    ids: tuple[int, ...]
    max_length: int
    tolerance: float


class Fleet:
    """
    Args:
        options: of the servers.
        urls: where they are.
        key: for them.
        probe: what they must agree about.
        hopeless: why none of them will answer any more; None: they may.

    Attributes:
        names: by URL, what the server calls its model.
        tags: by URL, of the weights that it was given last.
    """

    def __init__(
        self,
        options: VllmOptions,
        urls: Sequence[str],
        key: str,
        probe: Probe,
        hopeless: Callable[[], str | None] = lambda: None,
    ):
        self.options, self.urls, self.key, self.probe, self.hopeless = options, list(urls), key, probe, hopeless
        self.names: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.down: set[str] = set()
        self._served: set[str] = set()  # by whom weights have been taken before

    def introduce(self) -> None:
        """Wait until all servers answer, and see whether they can serve this run.

        Raises:
            VllmError: one cannot, or does not answer.
        """
        asyncio.run(self._with_all(self._introduce, self.urls, self.options.patience, must=True))

    def update(self, weights: Weights) -> None:
        """Give all servers these weights; one that does not answer is left out until the next update, if another does.

        Raises:
            VllmError: none has them.
            WrongWeightsError: the canary died.
        """
        asyncio.run(self._update(weights))

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
        if not await server.is_healthy():
            raise GivenUpError(f"{server.url} does not answer")
        version = str((await server.get("/version"))["version"])
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_VLLM:
            raise VllmError(f"{server.url} is vLLM {version}: {'.'.join(map(str, OLDEST_VLLM))} or newer is needed")
        await server.get("/weight_info")  # of the routes that replace weights
        card = (await server.get("/v1/models"))["data"][0]
        self.names[server.url] = card["id"]
        if card["max_model_len"] < self.probe.max_length:
            raise VllmError(
                f"{server.url} takes {card['max_model_len']} tokens, model.encoder_seq_length={self.probe.max_length}: start it "
                f"with --max-model-len {self.probe.max_length}"
            )
        asked = {"model": card["id"], "prompt": self.probe.text, "add_special_tokens": False}
        found = (await server.post("/tokenize", asked))["tokens"]
        if tuple(found) != self.probe.ids:
            raise VllmError(
                f"{server.url} has another tokenizer than this run: {self.probe.text!r} is {found} there and "
                f"{list(self.probe.ids)} here; start it with this run's model"
            )

    async def _update(self, weights: Weights) -> None:
        if len(self.urls) > 1 and self.tags:
            await self._with_all(self._give, self.urls, SHORT_PATIENCE, False, weights)
            if len(self.down) < len(self.urls):
                return
        await self._with_all(self._give, self.urls, self.options.patience, True, weights)

    async def _give(self, server: Connection, weights: Weights) -> None:
        """What is in flight, of a connection that was lost, is given up first: nothing begins with the old weights and ends with
        the new."""
        try:
            await server.post("/pause?mode=abort")
            await self._reload(server, weights.folder)
            cleared = await server.post("/reset_prefix_cache")
            if not cleared["success"]:
                raise GivenUpError(f"{server.url} did not clear its prefix cache")
            tag = f"{weights.version}.{secrets.token_hex(4)}"
            await server.post("/update_weight_version", {"new_version": tag})
            await server.post("/resume")
            await self._check(server, weights.canary)
        except BrokenError as error:
            if await server.is_healthy():
                raise VllmError(f"{server.url} cannot take the weights in {weights.folder}: {error}") from error
            raise
        self._served.add(server.url)
        self.tags[server.url] = tag

    async def _reload(self, server: Connection, folder: Path) -> None:
        """vLLM 0.32 ends where it cannot load a folder. If it never took weights of this run, it never will."""
        try:
            await server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        except GivenUpError as error:
            if server.url in self._served:
                raise
            raise VllmError(
                f"{server.url} has failed to load the weights in {folder}: can it read that folder, and does it serve this run's "
                f"model? Its log says more ({error})"
            ) from error

    async def _check(self, server: Connection, canary: Canary) -> None:
        name, tolerance = self.names[server.url], self.probe.tolerance
        of_text = canary.text_difference(await server.post("/v1/completions", canary.prompt_body(name)))
        if of_text > tolerance:
            raise WrongWeightsError(
                f"{server.url} has not the trainer's weights: its log-probabilities of the canary differ from the trainer's by "
                f"{of_text:.3g} nats on average, at most {tolerance:g} was expected (trainer.grpo.rollout.tolerance)"
            )
        scaled, unscaled = canary.sample_differences(
            await server.post("/v1/completions", canary.sample_body(name)),
        )
        if scaled > tolerance >= unscaled:
            raise VllmError(
                f"{server.url} gives log-probabilities from before the temperature: start it with --logprobs-mode "
                "processed_logprobs"
            )
        if scaled > tolerance:
            raise WrongWeightsError(
                f"{server.url} samples the canary's next token at temperature {TEMPERATURE:g} with log-probabilities that "
                f"differ from the trainer's by {scaled:.3g} nats on average, at most {tolerance:g} was expected; the text "
                f"before it differs by {of_text:.3g}: is something cached from older weights, or does the server add "
                "penalties or filters of its own (--generation-config vllm)?"
            )

    async def _complete(self, requests: list[Request], weights: Weights) -> list[list[Trajectory]]:
        calls = list(as_calls(requests))
        found: dict[int, list[Trajectory]] = {}
        for _ in range(ROUNDS):
            todo = [i for i in range(len(calls)) if i not in found]
            async with opened(self.key, self.options.timeout) as http:
                answers = await asyncio.gather(*(self._answer(http, calls[i], weights) for i in todo))
                used = sorted({url for url, _ in answers})
                kept = await asyncio.gather(*(self._still_has(Connection(http, url), weights) for url in used))
            trusted = {url for url, is_kept in zip(used, kept, strict=True) if is_kept}
            found |= {i: samples for i, (url, samples) in zip(todo, answers, strict=True) if url in trusted}
            if len(found) == len(calls):
                return _in_order(requests, calls, found)
            logger.warning(
                "%s has been started again: %d of %d answers are asked for once more",
                ", ".join(sorted(set(used) - trusted)), len(calls) - len(found), len(calls),
            )  # fmt: skip
            lost = [url for url in used if url not in trusted and url not in self.tags]
            others = len(self.urls) > len(lost)
            await self._with_all(
                self._give, lost, SHORT_PATIENCE if others else self.options.patience, not others, weights
            )
        raise VllmError(f"servers lost their weights {ROUNDS} times while they sampled one step: see their logs")

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
                return server.url, read_completion(answer, call, weights.version)
            except VllmError as error:
                raise VllmError(f"{server.url}: {error}") from error

        return await with_patience(self.options.patience, attempt, self.hopeless)

    async def _still_has(self, server: Connection, weights: Weights) -> bool:
        """Whether a server has had the same weights all the time. If not, it needs them, unless a peer has given them to it."""
        try:
            tag = (await server.get("/weight_info"))["weight_version"]
        except GivenUpError:
            tag = None
        if tag == self.tags.get(server.url):
            return True
        self.tags.pop(server.url, None)
        if tag and str(tag).startswith(f"{weights.version}."):
            self.tags[server.url] = tag
        return False


def _in_order(
    requests: list[Request], calls: list[ServerCall], found: dict[int, list[Trajectory]]
) -> list[list[Trajectory]]:
    """Each sample once."""
    result: list[dict[int, Trajectory]] = [{} for _ in requests]
    for i, call in enumerate(calls):
        result[call.number].update(zip(call.samples, found[i], strict=True))
    return [[samples[i] for i in range(request.samples)] for request, samples in zip(requests, result, strict=True)]
