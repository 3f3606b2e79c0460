"""HTTP to one server: what is worth asking again is told from what is not."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from json import JSONDecodeError
from typing import Any, TypeVar

import httpx

from megatron_ext.rollouts.vllm.protocol import GivenUpError, VllmError
from megatron_ext.runtime.progress import PROGRESS
from megatron_ext.vllm_servers.options import KEY_VARIABLE

__all__ = ["BrokenError", "Connection", "opened", "with_patience"]

T = TypeVar("T")

logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request otherwise

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0  # seconds
CONNECT = 10.0  # seconds
CONNECTIONS = 256  # open at once, to all servers; calls beyond wait their turn


class BrokenError(GivenUpError):
    """The server itself says that it could not (5xx)."""


def opened(key: str, timeout: float) -> httpx.AsyncClient:
    """
    Args:
        timeout: seconds without a byte of an answer.
    """
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(timeout, connect=CONNECT, pool=None),
        limits=httpx.Limits(max_connections=CONNECTIONS),
        trust_env=False,  # a cluster's proxy does not know its machines
    )


class Connection:
    """
    Args:
        http: see `opened`.
        url: of the server, without a path.
    """

    def __init__(self, http: httpx.AsyncClient, url: str):
        self.http, self.url = http, url.rstrip("/")

    async def get(self, path: str) -> Any:
        return await self._ask("GET", path)

    async def post(self, path: str, body: dict | None = None) -> Any:
        return await self._ask("POST", path, body)

    async def is_healthy(self) -> bool:
        try:
            return (await self.http.get(f"{self.url}/health")).status_code == 200
        except httpx.RequestError:
            return False

    async def _ask(self, method: str, path: str, body: dict | None = None) -> Any:
        """The JSON of an answer; None where it has no content.

        Raises:
            GivenUpError: no whole answer has come, or the server is at its limit.
            BrokenError: the server could not.
            VllmError: it would not.
        """
        try:
            answer = await self.http.request(method, f"{self.url}{path}", json=body)
        except httpx.RequestError as error:
            raise GivenUpError(f"{self.url}: {type(error).__name__} {error}".rstrip()) from error
        PROGRESS.made()
        status = answer.status_code
        if status == 429:
            raise GivenUpError(f"{self.url}{path} says {status}")
        if status >= 500:
            raise BrokenError(f"{self.url}{path} says {status}: {_message(answer)}")
        if status == 401:
            raise VllmError(
                f"{self.url} refuses the key: set {KEY_VARIABLE} to the one that the server was started with"
            )
        if status == 404:
            raise VllmError(
                f"{self.url} has no {path}: is it vLLM 0.32 or newer, started with VLLM_SERVER_DEV_MODE=1 in its environment?"
            )
        if status >= 400:
            raise VllmError(f"{self.url}{path} says {status}: {_message(answer)}")
        try:
            return answer.json() if answer.content else None
        except (JSONDecodeError, UnicodeDecodeError) as error:
            raise GivenUpError(f"{self.url}{path} gave no JSON") from error


async def with_patience(
    patience: float, attempt: Callable[[int], Awaitable[T]], hopeless: Callable[[], str | None]
) -> T:
    """Try until it succeeds, with pauses that double.

    Args:
        patience: seconds since the first failure.
        attempt: is told how often it has failed before.
        hopeless: why no further attempt can succeed; None: one may.

    Raises:
        VllmError: one of an attempt's, or patience is at its end.
    """
    failures, since = 0, 0.0
    while True:
        try:
            return await attempt(failures)
        except GivenUpError as error:
            failures += 1
            since = since or time.monotonic()
            if reason := hopeless():
                raise VllmError(f"{reason} ({error})") from error
            if time.monotonic() - since > patience:
                raise VllmError(
                    f"{error}: no answer after {failures} attempts in {patience:g} s (trainer.grpo.rollout.patience)"
                ) from error
            await asyncio.sleep(random.uniform(0.5, 1) * min(FIRST_PAUSE * 2 ** min(failures, 10), LONGEST_PAUSE))


def _message(answer: httpx.Response) -> str:
    try:
        content = answer.json()
        error = content.get("error", content)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (JSONDecodeError, UnicodeDecodeError, AttributeError):
        return answer.text[:200] or answer.reason_phrase
