"""A server of one reward, for any that needs a GPU of its own, other packages or a sandbox: training ranks only ask.

    POST /score {"id": any, "responses": [texts], "rows": [objects]} -> {"id": the same, "reward": name, "rewards": [numbers]}
    GET /health -> {"status": "ok", "reward": name};  GET /metrics: counters, as Prometheus reads them

null among the rewards is a response that was not scored in time. Errors are {"error": one line}, with "index" where they are of
one response: 400 a bad question, 401 a wrong token, 413 too large, 422 the reward failed, 503 busy (ask again).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from recipes.cli.config import ConfigError
from recipes.rewards.asking import Asker, NobodyWaitsError, asker, serving
from recipes.rewards.processes import Lost, PromptCall, RewardProcesses
from recipes.rewards.registry import NamedReward, RewardError, score

__all__ = ["ServerLimits", "reward_app"]

LOOK_SECONDS = 0.5  # between looks at whether the one who asked still waits
GONE = 499  # in /metrics: who has asked does not hear it any more
EXPECTED = 'expected {"responses": [texts], "rows": [objects]} of one length'


@dataclass(frozen=True)
class ServerLimits:
    """
    Attributes:
        timeout: seconds for the responses to one prompt.
        processes: that the reward is asked in.
        batch: responses of a request.
        body: bytes of a request.
        waiting: requests that may wait while others are scored.
    """

    timeout: float = 60.0
    processes: int = 1
    batch: int = 4096
    body: int = 1 << 28
    waiting: int = 256

    def __post_init__(self):
        if min(self.timeout, self.processes, self.batch, self.body, self.waiting) <= 0:
            raise ConfigError(f"limits of a reward server must be positive, got {self}")


class _Refused(Exception):
    def __init__(self, status: int, error: str, **more: Any):
        super().__init__(error)
        self.status, self.content = status, {"error": error, **more}


class _Scorer:
    """Asks the reward, one request after the other: each is spread over all processes."""

    def __init__(self, reward: NamedReward, limits: ServerLimits):
        self.reward = reward
        self.processes = RewardProcesses([reward], limits.timeout, limits.processes)
        self._one_at_a_time = threading.Lock()

    def score(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float | None]:
        with self._one_at_a_time:
            asker().check()
            if self.reward.bounds_itself:
                return score(self.reward, responses, rows)
            return self._in_processes(responses, rows)

    def _in_processes(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float | None]:
        """A call for each run of responses that have one row."""
        firsts = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]]
        ends = [*firsts[1:], len(rows)]
        calls = [PromptCall(tuple(responses[i:end]), rows[i]) for i, end in zip(firsts, ends, strict=True)]
        values: list[float | None] = []
        answers = self.processes.ask(0, calls)
        try:
            for answer, call in zip(answers, calls, strict=True):
                values += [None] * len(call.responses) if isinstance(answer, Lost) else answer
        except RewardError as error:
            error.index = len(values) if error.index is None else error.index
            raise
        finally:
            answers.close()
        return values


def reward_app(reward: NamedReward, token: str | None = None, limits: ServerLimits = ServerLimits()) -> FastAPI:
    """The application, for uvicorn.

    Args:
        token: that requests must show, as `Authorization: Bearer`; None: anybody may ask.
    """
    scorer, counts, waiting = _Scorer(reward, limits), Counter(), asyncio.Semaphore(limits.waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        scorer.processes.close()

    app = FastAPI(title="reward", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(_Refused)
    async def refuse(request: Request, error: _Refused) -> JSONResponse:
        counts[f'requests_total{{status="{error.status}"}}'] += 1
        return JSONResponse(error.content, error.status, headers={"Retry-After": "1"} if error.status == 503 else None)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "reward": reward.name}

    @app.get("/metrics")
    async def metrics() -> Response:
        lines = [f"reward_{name} {value:g}" for name, value in sorted(counts.items())]
        return PlainTextResponse("\n".join(lines) + "\n")

    @app.post("/score")
    async def scores(request: Request) -> dict:
        given = request.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise _Refused(401, "wrong token, or none: set MEGATRON_EXT_REWARD_TOKEN as the server has it")
        if waiting.locked():
            raise _Refused(503, f"{limits.waiting} requests wait already")
        async with waiting:
            name, responses, rows = _question(await _body(request, limits.body), limits.batch)
            begun = time.monotonic()
            try:
                values = await _while_connected(request, scorer, responses, rows)
            except RewardError as error:
                index = {} if error.index is None else {"index": error.index}
                raise _Refused(422, str(error), **index) from error
        counts['requests_total{status="200"}'] += 1
        counts["responses_total"] += len(values)
        counts["timeouts_total"] += values.count(None)
        counts["seconds_total"] += time.monotonic() - begun
        return {"id": name, "reward": reward.name, "rewards": values}

    return app


async def _while_connected(
    request: Request, scorer: _Scorer, responses: list[str], rows: list[dict]
) -> list[float | None]:
    """What they are worth; where the one who asks goes away it is not computed any further.

    Raises:
        RewardError: as the reward does.
    """
    who = Asker()
    serving(who)
    scoring = asyncio.ensure_future(asyncio.to_thread(scorer.score, responses, rows))
    while not (await asyncio.wait({scoring}, timeout=LOOK_SECONDS))[0]:
        if await request.is_disconnected():
            who.left()
    try:
        return await scoring
    except (NobodyWaitsError, RewardError) as error:
        if await request.is_disconnected():
            raise _Refused(GONE, "nobody waits for the answer") from error
        raise


async def _body(request: Request, limit: int) -> bytes:
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > limit:
            raise _Refused(413, f"a request has at most {limit} bytes: ask for fewer responses at once")
    return bytes(found)


def _question(body: bytes, most: int) -> tuple[Any, list[str], list[dict]]:
    try:
        asked = json.loads(body)
        responses, rows = asked["responses"], asked["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise _Refused(400, EXPECTED) from error
    if not _all(responses, str) or not _all(rows, dict) or len(responses) != len(rows):
        raise _Refused(400, EXPECTED)
    if len(responses) > most:
        raise _Refused(413, f"{len(responses)} responses are more than {most}: ask for fewer at once (batch_size)")
    return asked.get("id"), responses, rows


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
