"""Rewards over HTTP: a server for any of them, and the reward `http` that asks it.

    POST /score {"responses": [...], "rows": [...]} -> {"rewards": [...]};  GET / -> {"reward": name}

A reward that needs a GPU of its own, other packages or a sandbox runs where it likes; training ranks only ask. Errors come back
with status 400 and {"error": one line}.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from recipes.cli.config import ConfigError
from recipes.rewards.registry import KEY, Reward, RewardError, register_reward, score

__all__ = ["URL_VARIABLE", "HttpReward", "reward_server"]

URL_VARIABLE = "MEGATRON_EXT_REWARD_URL"
LARGEST_BODY = 1 << 30
PAUSE_SECONDS = 0.5


@register_reward("http")
@dataclass(frozen=True)
class HttpReward:
    """Rewards that a server computes (launch/serve_reward.py)."""

    # http://host:port; null: what MEGATRON_EXT_REWARD_URL says, which a requeued job may set anew.
    url: str | None = None
    # Seconds for one batch of responses.
    timeout: float = 600.0
    # Seconds to wait for a server that does not answer yet.
    patience: float = 120.0

    def __post_init__(self):
        if not self._address.startswith(("http://", "https://")):
            raise ConfigError(f"{KEY}.url={self._address or 'null'}: give http://host:port here, or in {URL_VARIABLE}")
        if self.timeout <= 0 or self.patience < 0:
            raise ConfigError(
                f"{KEY}: timeout={self.timeout} must be positive, and patience={self.patience} not negative"
            )

    @property
    def _address(self) -> str:
        return (self.url or os.environ.get(URL_VARIABLE, "")).rstrip("/")

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        body = json.dumps({"responses": list(responses), "rows": list(rows)}).encode()
        request = urllib.request.Request(f"{self._address}/score", body, {"Content-Type": "application/json"})
        deadline = time.monotonic() + self.patience
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())["rewards"]
            except urllib.error.HTTPError as error:
                raise RewardError(f"{self._address} says {error.code}: {_message(error)}") from error
            except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    reason = getattr(error, "reason", error)
                    raise RewardError(
                        f"{self._address} does not answer ({reason}); is launch/serve_reward.py running?"
                    ) from error
                time.sleep(PAUSE_SECONDS)
            except (ValueError, KeyError, TypeError) as error:
                raise RewardError(f'{self._address} gave no {{"rewards": [...]}}') from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"])
    except (ValueError, KeyError, TypeError):
        return error.reason


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def reward_server(reward: Reward, name: str, host: str, port: int) -> ThreadingHTTPServer:
    """A server of one reward; call its `serve_forever`. Port 0 takes a free one, in `server_address`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {"reward": name})

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if self.path != "/score" or not length.isdecimal() or int(length) > LARGEST_BODY:
                self._answer(404 if self.path != "/score" else 411, {"error": "POST /score with a Content-Length"})
                return
            try:
                asked = json.loads(self.rfile.read(int(length)))
                responses, rows = asked["responses"], asked["rows"]
                if not _all(responses, str) or not _all(rows, dict) or len(responses) != len(rows):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                self._answer(400, {"error": 'expected {"responses": [texts], "rows": [objects]} of one length'})
                return
            try:
                self._answer(200, {"rewards": score(reward, responses, rows)})
            except RewardError as error:
                self._answer(400, {"error": str(error)})

        def _answer(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            """Nothing for each request."""

    return ThreadingHTTPServer((host, port), Handler)
