"""The reward judge: a chat model behind an OpenAI-compatible endpoint reads a response, and says what it is worth."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError
from recipes.rewards.asking import NobodyWaitsError, asker
from recipes.rewards.exact_answer import without_thought
from recipes.rewards.registry import KEY, RewardError, register_reward

__all__ = ["KEY_VARIABLE", "Judge"]

logger = logging.getLogger(__name__)

KEY_VARIABLE = "MEGATRON_EXT_JUDGE_KEY"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0
BUSY = (408, 425, 429, 500, 502, 503, 504)
WRONG = (401, 403, 404)  # whatever is asked
RUBRIC = """You are a strict judge. Here is a question and a response to it.

# Question
{prompt}

# Response
{response}

Think about whether the response is correct, complete and to the point. Then end with one line:
Score: a number from {low} to {high}"""
_FIELD = re.compile(r"\{(\w+)\}")


class _Declined(RewardError):
    """One question, such as one that is too long for it."""


@register_reward("judge")
@dataclass(frozen=True)
class Judge:
    """(verdict - low) / (high - low): what the judge says behind its last "Score:", 0 to 1.

    A judge that gives no verdict is asked again; if it never does, or refuses the question, the response was not scored in
    time (trainer.grpo.on_reward_timeout).
    """

    bounds_itself: ClassVar = True

    # http://host:port/v1, of any server with POST /chat/completions.
    url: str
    # As the endpoint calls it.
    model: str
    # What it is told: {response}, {prompt}, {low}, {high}, and any key of a row. null: a rubric for answers in general.
    rubric: str | None = None
    # Pattern of the verdict in its answer, whose first group is the number; the last one counts.
    verdict: str = r"Score:\s*\**\s*(-?\d+(?:\.\d+)?)"
    # The lowest and the highest verdict; another one is none.
    low: float = 0.0
    high: float = 10.0
    # Of the judge.
    temperature: float = 0.0
    max_tokens: int = 2048
    # Requests at once, how often one response is asked about at most, and seconds for all responses of a step.
    requests: int = 16
    tries: int = 4
    timeout: float = 900.0

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{KEY}.url={self.url}: give http://host:port/v1")
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise ConfigError(f"{KEY}.low={self.low} must be less than {KEY}.high={self.high}")
        if min(self.requests, self.tries, self.max_tokens, self.timeout) <= 0:
            raise ConfigError(f"{KEY}: requests, tries, max_tokens and timeout must be positive")
        try:
            groups = re.compile(self.verdict).groups
        except re.error as error:
            raise ConfigError(f"{KEY}.verdict={self.verdict!r} is not a regular expression: {error}") from error
        if groups < 1:
            raise ConfigError(f"{KEY}.verdict={self.verdict!r} needs a group, ( ), around the number")
        if "response" not in self._fields:
            raise ConfigError(f"{KEY}.rubric does not say where the response stands: write {{response}}")

    @property
    def _text(self) -> str:
        return RUBRIC if self.rubric is None else self.rubric

    @property
    def _fields(self) -> set[str]:
        return {*_FIELD.findall(self._text)}

    @property
    def row_keys(self) -> Sequence[str]:
        return sorted(self._fields - {"response", "prompt", "low", "high"})

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuse a row without what the rubric asks for.

        Raises:
            UserError: it lacks a key.
        """
        self.question("", row)

    def question(self, response: str, row: Mapping[str, Any]) -> str:
        """What the judge is asked."""
        known = {
            "low": f"{self.low:g}",
            "high": f"{self.high:g}",
            "response": without_thought(response),
            "prompt": _prompt(row),
        }

        def filled(field: re.Match) -> str:
            name = field[1]
            value = known[name] if name in known else row.get(name)
            if value is None:
                raise UserError(
                    f"the rubric of the judge asks for {name}, and the row has none: add it, or change {KEY}.rubric"
                )
            return value if isinstance(value, str) else str(value)

        return _FIELD.sub(filled, self._text)  # in one pass: what a response says is not filled in

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float | None]:
        return asyncio.run(self._all([self.question(r, row) for r, row in zip(responses, rows, strict=True)]))

    async def _all(self, questions: Sequence[str]) -> list[float | None]:
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        free = asyncio.Semaphore(self.requests)
        away: list[httpx.TransportError] = []  # since it has last answered
        refused: list[_Declined] = []
        async with httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(None, connect=10.0)) as client:
            # Not before: to read certificates takes long on a busy machine.
            deadline = asyncio.get_running_loop().time() + self.timeout

            async def one(question: str) -> float | None:
                try:
                    async with asyncio.timeout_at(deadline), free:
                        return await self._verdict(client, question, away)
                except _Declined as error:
                    refused.append(error)
                except TimeoutError as error:
                    if away:
                        said = str(away[-1]) or type(away[-1]).__name__
                        raise RewardError(f"{self.url} does not answer ({said}), for {self.timeout:g} s") from error
                return None

            try:
                async with asyncio.TaskGroup() as group:
                    asked = [group.create_task(one(question)) for question in questions]
            except* (RewardError, NobodyWaitsError) as errors:
                raise errors.exceptions[0] from errors
        if refused and len(refused) == len(questions):
            raise refused[0]
        if refused:
            logger.warning("the judge refuses %d of %d questions: %s", len(refused), len(questions), refused[0])
        return [task.result() for task in asked]

    async def _verdict(
        self, client: httpx.AsyncClient, question: str, away: list[httpx.TransportError]
    ) -> float | None:
        """Until it gives one, or has had its tries; a server that is away is waited for as long as there is time."""
        pause, tries = FIRST_PAUSE, 0
        while tries < self.tries:
            asker().check()
            try:
                answer = await client.post(
                    f"{self.url.rstrip('/')}/chat/completions", json=self._asked(question, tries)
                )
            except httpx.TransportError as error:
                away.append(error)
            else:
                away.clear()
                if answer.status_code not in BUSY:
                    if (value := self._read(answer)) is not None:
                        return value
                    tries += 1
                    continue
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)
        return None

    def _asked(self, question: str, tries: int) -> dict[str, Any]:
        """Asked again with the same words and seed it would say the same."""
        return {
            "model": self.model, "messages": [{"role": "user", "content": question}], "max_tokens": self.max_tokens,
            "temperature": self.temperature, "seed": tries,
        }  # fmt: skip

    def _read(self, answer: httpx.Response) -> float | None:
        if not answer.is_success:
            kind = RewardError if answer.status_code in WRONG else _Declined
            raise kind(f"{self.url} says {answer.status_code}: {' '.join(answer.text.split())[:200]}")
        try:
            said = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise RewardError(f"{self.url} gave no chat completion: {' '.join(answer.text.split())[:100]}") from error
        found = re.findall(self.verdict, without_thought(said)) if isinstance(said, str) else []
        if not found:
            return None
        last = found[-1][0] if isinstance(found[-1], tuple) else found[-1]
        try:
            value = float(last)
        except ValueError:
            return None
        return (value - self.low) / (self.high - self.low) if self.low <= value <= self.high else None


def _prompt(row: Mapping[str, Any]) -> str | None:
    """The question as a text: a plain one, or the messages with who says them."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    messages = row.get("messages")
    return None if messages is None else "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in messages)
