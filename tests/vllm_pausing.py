"""A server that speaks only when it is told to, and is paused in the midst of responses, as vLLM is when new weights come."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.vllm_faults import Faulty, Handler, served

__all__ = ["Pausing", "pausing_server", "token_of"]


def token_of(place: int) -> int:
    """What every response says at this place."""
    return 100 + place


@dataclass(eq=False)
class Asked:
    """A request in flight.

    Attributes:
        labels: for each sample that of each token that it has said.
        reason: why it is over; None: it goes on.
    """

    body: dict
    labels: list[list[str]] = field(default_factory=list)
    reason: str | None = None

    @property
    def params(self) -> dict:
        return self.body["sampling_params"]


class Pausing(Faulty):
    """A prompt is [length of what was asked at first, ...]: what stands behind so many tokens has been said before. The
    log-probability of a token is minus the version of its weights.

    Attributes:
        flight: what it has been asked for and not yet answered.
        bodies: of all requests for responses.
        refusal: the status that it answers them with; None: it answers.
    """

    def __init__(self):
        super().__init__(_Handler)
        self.changed = threading.Condition()
        self.flight: list[Asked] = []
        self.bodies: list[dict] = []
        self.refusal: int | None = None

    def wait_for(self, count: int) -> None:
        """Until so many requests are in flight."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.flight) == count, 60), [a.body for a in self.flight]

    def speak(self, *counts: int) -> None:
        """Each sample of every request says so many tokens more, by its place in the request; the last number is that of all
        behind."""
        with self.changed:
            for asked in self.flight:
                for place, labels in enumerate(asked.labels):
                    count = counts[min(place, len(counts) - 1)]
                    labels += [self.tag] * min(count, asked.params["max_tokens"] - len(labels))
                if all(len(labels) == asked.params["max_tokens"] for labels in asked.labels):
                    asked.reason = "length"
            self._answered()

    def end(self, reason: str) -> None:
        """All that is in flight: "abort" or "killed"."""
        with self.changed:
            for asked in self.flight:
                asked.reason = reason
            self._answered()

    def _answered(self) -> None:
        self.flight = [asked for asked in self.flight if asked.reason is None]
        self.changed.notify_all()


class _Handler(Handler):
    server: Pausing

    def posted(self, body: dict | None) -> None:
        if self.path == "/pause?mode=abort":
            self.server.end("abort")
        if self.path != "/inference/v1/generate":
            super().posted(body)
            return
        if self.server.refusal:
            self.answer(self.server.refusal, {"error": {"message": "so it is"}})
            return
        asked = Asked(body, [[] for _ in range(body["sampling_params"]["n"])])
        with self.server.changed:
            self.server.bodies.append(body)
            self.server.flight.append(asked)
            self.server.changed.notify_all()
            self.server.changed.wait_for(lambda: asked.reason is not None, 60)
        if asked.reason == "killed":
            self.reset()
        else:
            self.answer(200, _answer(asked))


def _answer(asked: Asked) -> dict:
    before = len(asked.body["token_ids"]) - asked.body["token_ids"][0]
    return {
        "prompt_token_ids": asked.body["token_ids"],
        "choices": [_choice(index, labels, before, asked) for index, labels in enumerate(asked.labels)],
    }


def _choice(index: int, labels: Sequence[str], before: int, asked: Asked) -> dict:
    tokens = [token_of(before + i) for i in range(len(labels))]
    spans: list[dict] = []
    for place, label in enumerate(labels):
        if not spans or spans[-1]["version"] != label:
            spans.append({"version": label, "start": place, "end": place})
        spans[-1]["end"] = place + 1
    content = [
        {"token_id": token, "logprob": -float(label.partition(".")[0] if label != "default" else 0)}
        for token, label in zip(tokens, labels, strict=True)
    ]
    full = len(labels) == asked.params["max_tokens"]
    return {
        "index": index, "token_ids": tokens, "logprobs": {"content": content}, "weight_versions": spans,
        "finish_reason": "length" if full else asked.reason, "stop_reason": None,
    }  # fmt: skip


@contextlib.contextmanager
def pausing_server() -> Iterator[Pausing]:
    with served(Pausing()) as server:
        try:
            yield server
        finally:
            server.end("killed")
