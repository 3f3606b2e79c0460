"""A server that fails on purpose: between its faults it repeats what a real vLLM once said."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar

import torch

from megatron_ext.rollouts.vllm.canary import Canary
from megatron_ext.rollouts.vllm.checks import Probe
from tests.vllm_cases import recorded

__all__ = ["Faulty", "Handler", "faulty_server", "recorded_canary", "recorded_probe", "served"]


T = TypeVar("T", bound="Faulty")

RECORDS = ("version", "models", "tokens", "weight_info")


def recorded_canary() -> Canary:
    """The text of the record, with a trainer that says what the server says; its next token is taken for certain."""
    record = recorded("canary")
    tokens = record["body"]["prompt"]
    told = record["answer"]["choices"][0]["prompt_logprobs"][1:]
    expected = tuple(entry[str(token)]["logprob"] for token, entry in zip(tokens[1:], told, strict=True))
    return Canary(tuple(tokens), expected, torch.zeros(32), torch.zeros(32))


def recorded_probe() -> Probe:
    """What the recorded server agrees about."""
    tokens = recorded("tokens")
    return Probe(tokens["body"]["prompt"], tuple(tokens["answer"]["tokens"]), 256, 1e-4)


class Faulty(ThreadingHTTPServer):
    """
    Attributes:
        faults: what happens to the next completions, one after the other: a status, "reset", "cut", "no json" or "forget" (it
            has been started again since); behind them all is well.
        tag: of its weights.
        asked: how often it was asked for what.
        records: by path, what it repeats of everything but completions.
    """

    daemon_threads = True

    def __init__(self, handler: type[Handler] | None = None):
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.faults: list[int | str] = []
        self.tag = "default"
        self.asked: Counter[str] = Counter()
        self.records = {found["path"]: (found["status"], found["answer"]) for found in map(recorded, RECORDS)}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_) -> None:
        """A client that is gone is what is tested."""


def faulty_server() -> contextlib.AbstractContextManager[Faulty]:
    return served(Faulty())


@contextlib.contextmanager
def served(server: T) -> Iterator[T]:
    """While it answers."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Faulty
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._count()
        status, answer = self.server.records.get(self.path, (200, {}))
        self.answer(status, answer | {"weight_version": self.server.tag} if self.path == "/weight_info" else answer)

    def do_POST(self) -> None:
        self._count()
        self.posted(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null"))

    def posted(self, body: dict | None) -> None:
        if self.path == "/update_weight_version":
            self.server.tag = body["new_version"]
        if self.path != "/v1/completions":
            self.answer(*self.server.records.get(self.path, (200, {"success": True})))
        elif "prompt_logprobs" in body:
            self.answer(200, recorded("canary")["answer"])
        elif body["prompt"] == recorded("canary")["body"]["prompt"] and "n" in body and body["max_tokens"] == 1:
            choices = [{"token_ids": [1], "logprobs": {"token_logprobs": [0.0]}} for _ in range(body["n"])]
            self.answer(200, {"choices": choices})
        else:
            self._complete(body)

    def _complete(self, body: dict) -> None:
        with self.server.lock:
            fault = self.server.faults.pop(0) if self.server.faults else None
        answer = recorded("hot")["answer"]
        for choice in answer["choices"]:
            choice["prompt_token_ids"] = body["prompt"]
            choice["logprobs"]["token_logprobs"] = [-float(body["prompt"][0])] * len(choice["token_ids"])
        if fault == "forget":
            self.server.tag = "default"
        if fault in (None, "forget"):
            self.answer(200, answer)
        elif fault == "reset":
            self.reset()
        elif fault == "cut":
            self.answer(200, answer, cut=100)
        elif fault == "no json":
            self.answer(200, "<html>")
        else:
            self.answer(fault, {"error": {"message": "so it is"}})

    def reset(self) -> None:
        """As a process that is killed does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _count(self) -> None:
        with self.server.lock:
            self.server.asked[self.path.partition("?")[0]] += 1

    def answer(self, status: int, content: object, cut: int | None = None) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_) -> None:
        """Nothing for each request."""
