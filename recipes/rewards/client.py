"""The reward http: asks a server (`recipes.rewards.server`) in batches, waits where it is busy or gone, and asks again.

No answer is taken on trust: it must be to this question, from the reward that has answered before, and of the right count.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import httpx

from recipes.cli.config import ConfigError
from recipes.rewards.registry import KEY, RewardError, register_reward

__all__ = ["TOKEN_VARIABLE", "URL_VARIABLE", "HttpReward"]

logger = logging.getLogger(__name__)

URL_VARIABLE = "MEGATRON_EXT_REWARD_URL"
TOKEN_VARIABLE = "MEGATRON_EXT_REWARD_TOKEN"
CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0
BUSY = (429, 502, 503, 504)


@dataclass
class _Seen:
    """What the server has shown: the reward that answers, and since when it does not."""

    reward: str | None = None
    away_since: float | None = None


@dataclass(frozen=True)
class HttpReward:
    """Rewards that a server computes (launch/serve_reward.py)."""

    bounds_itself: ClassVar = True

    # http://host:port; null: what MEGATRON_EXT_REWARD_URL says, which a requeued job may set anew.
    url: str | None = None
    # Seconds for one batch of responses, at a server that lives.
    timeout: float = 600.0
    # Seconds to wait for a server that has not answered yet.
    patience: float = 120.0
    # Seconds to wait for one that has answered before and is gone: the run pauses, and all of its ranks wait as long.
    outage: float = 1500.0
    # Responses of a request, and requests at once.
    batch_size: int = 256
    requests: int = 4
    _seen: _Seen = field(default_factory=_Seen, init=False, repr=False, compare=False)

    def __post_init__(self):
        if not self._address.startswith(("http://", "https://")):
            raise ConfigError(f"{KEY}.url={self._address or 'null'}: give http://host:port here, or in {URL_VARIABLE}")
        if self.timeout <= 0 or self.patience < 0 or self.outage < 0:
            raise ConfigError(
                f"{KEY}: timeout={self.timeout} must be positive, patience={self.patience} and outage={self.outage} not negative"
            )
        if self.batch_size < 1 or self.requests < 1:
            raise ConfigError(f"{KEY}: batch_size={self.batch_size} and requests={self.requests} must be at least 1")

    @property
    def _address(self) -> str:
        return (self.url or os.environ.get(URL_VARIABLE, "")).rstrip("/")

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float | None]:
        return asyncio.run(self._all(responses, rows))

    async def _all(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float | None]:
        token = os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # each request has its own limit, for all of it
        free = asyncio.Semaphore(self.requests)
        opened = httpx.AsyncClient(
            base_url=self._address,
            headers=headers,
            timeout=timeout,
            trust_env=False,  # a cluster's proxy does not know its machines
        )
        async with opened as client:

            async def batch(first: int) -> list[float | None]:
                part = slice(first, first + self.batch_size)
                async with free:
                    return await self._batch(client, responses[part], rows[part], first)

            try:
                async with asyncio.TaskGroup() as group:
                    asked = [group.create_task(batch(i)) for i in range(0, len(responses), self.batch_size)]
            except* RewardError as errors:
                raise errors.exceptions[0] from errors
        return [value for task in asked for value in task.result()]

    async def _batch(
        self, client: httpx.AsyncClient, responses: Sequence[str], rows: Sequence[dict], first: int
    ) -> list[float | None]:
        """Until the server has answered."""
        name, since, pause = uuid.uuid4().hex, None, FIRST_PAUSE
        body = json.dumps({"id": name, "responses": list(responses), "rows": list(rows)}).encode()
        while True:
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await client.post("/score", content=body, headers={"Content-Type": "application/json"})
                if answer.status_code not in BUSY:
                    values = self._values(answer, name, len(responses), first)
                    self._is_there()
                    return values
                reason = f"{answer.status_code} {answer.reason_phrase}"
            except TimeoutError:
                if await self._lives(client):
                    return [None] * len(responses)
                reason = f"no answer in {self.timeout:g} s, and none to /health"
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            since = since or time.monotonic()
            self._wait_or_end(since, reason)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _lives(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get("/health", timeout=CONNECT_SECONDS)).is_success
        except httpx.HTTPError:
            return False

    def _values(self, answer: httpx.Response, name: str, count: int, first: int) -> list[float | None]:
        try:
            said = answer.json()
        except ValueError:
            said = None
        said = said if isinstance(said, dict) else {}
        if not answer.is_success:
            error = RewardError(f"{self._address} says {answer.status_code}: {said.get('error', answer.reason_phrase)}")
            if isinstance(index := said.get("index"), int):
                error.index = first + index
            raise error
        values, reward = said.get("rewards"), said.get("reward")
        if not isinstance(values, list) or not isinstance(reward, str):
            raise RewardError(f'{self._address} gave no {{"reward": name, "rewards": [...]}}')
        if said.get("id") != name or len(values) != count:
            raise RewardError(
                f"{self._address} answered another question than it was asked: is something between it and the run?"
            )
        if self._seen.reward not in (None, reward):
            raise RewardError(
                f"{self._address} serves the reward {reward} now, and served {self._seen.reward} before: start the server as "
                "it was"
            )
        self._seen.reward = reward
        return values

    def _is_there(self) -> None:
        if (since := self._seen.away_since) is not None:
            self._seen.away_since = None
            logger.warning("%s answers again after %.0f s: the run goes on", self._address, time.monotonic() - since)

    def _wait_or_end(self, since: float, reason: str) -> None:
        known = self._seen.reward is not None
        patience = self.outage if known else self.patience
        if time.monotonic() - since >= patience:
            raise RewardError(
                f"{self._address} does not answer ({reason}), for {patience:g} s; is launch/serve_reward.py running?"
            )
        if known and self._seen.away_since is None:
            self._seen.away_since = since
            logger.warning("%s does not answer (%s): the run waits, up to %.0f s", self._address, reason, patience)


register_reward("http")(HttpReward)
