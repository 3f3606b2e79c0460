"""What servers are told when weights are sent to them, and what becomes of a transfer that fails on either side."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ext.hf.gather import HostTensors
from megatron_ext.rollouts import Request, SamplingParams
from megatron_ext.rollouts.vllm import sender as sender_module
from megatron_ext.rollouts.vllm.client import Connection, opened
from megatron_ext.rollouts.vllm.fleet import Fleet, Weights
from megatron_ext.rollouts.vllm.nccl import NcclError
from megatron_ext.rollouts.vllm.protocol import VllmError
from megatron_ext.rollouts.vllm.sender import Sender
from megatron_ext.vllm_servers import VllmOptions
from tests.vllm_faults import Faulty, Handler, recorded, recorded_canary, recorded_probe, served
from tests.waiting import until

UNIQUE = bytes(range(128))
SHAPES = {"a": (2, 3), "b": (4,), "c": (5, 1)}


class Asked(Faulty):
    """
    Attributes:
        posts: what it was told, in order.
        statuses: by path, instead of 200.
        slow: paths that are answered when `go` is set.
    """

    def __init__(self):
        super().__init__(AskedHandler)
        self.posts: list[tuple[str, dict | None]] = []
        self.statuses: dict[str, int] = {}
        self.slow: set[str] = set()
        self.go = threading.Event()
        self.records["/get_world_size"] = 200, {"world_size": 2}


class AskedHandler(Handler):
    server: Asked

    def posted(self, body: dict | None) -> None:
        self.server.posts.append((self.path, body))
        if self.path in self.server.slow:
            self.server.go.wait(60)
        if self.path in self.server.statuses:
            self.answer(self.server.statuses[self.path], {"error": {"message": "so it is"}})
        else:
            super().posted(body)


class Spy:
    """Broadcasters and what they make: what was sent is kept.

    Attributes:
        fails: the next broadcast does.
        hangs: nothing joins and nothing is sent, until it is aborted.
    """

    def __init__(self):
        self.joined: list[tuple[bytes, int]] = []
        self.sent: list[list[int]] = []
        self.aborted = 0
        self.fails = self.hangs = False
        self._abort = threading.Event()

    def unique_id(self) -> bytes:
        return UNIQUE

    def join(self, unique: bytes, size: int) -> Spy:
        if self.hangs:
            self._abort.wait(60)
        self.joined.append((unique, size))
        return self

    def broadcast(self, data: torch.Tensor) -> None:
        if self.fails:
            raise NcclError("ncclBroadcast: remote process exited")
        if self.hangs:
            self._abort.wait(60)
            raise NcclError("it was aborted")
        self.sent.append(data.tolist())

    def abort(self) -> None:
        self.aborted += 1
        self._abort.set()


@pytest.fixture
def server() -> Iterator[Asked]:
    with served(Asked()) as found:
        yield found
        found.go.set()


@pytest.fixture
def tensors(rng) -> HostTensors:
    held = HostTensors(SHAPES, torch.bfloat16, 16)
    for tensor in held.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=rng))
    return held


def send(sender: Sender, url: str, tensors: HostTensors, label: str, given: str | None = None) -> None:
    async def run() -> None:
        async with opened("", 60) as http:
            await sender.send(Connection(http, url), tensors, label, given)

    asyncio.run(run())


def test_what_a_server_is_told_and_sent(server, tensors):
    spy = Spy()
    sender = Sender(spy)
    send(sender, server.url, tensors, "default")
    (paths, bodies) = zip(*server.posts, strict=True)
    assert paths == (
        "/shutdown_weight_transfer_engine", "/init_weight_transfer_engine", "/update_weight_version", "/start_weight_update",
        "/update_weights", "/finish_weight_update",
    )  # fmt: skip
    unique = base64.b64encode(UNIQUE).decode()
    assert bodies[1] == {
        "init_info": {
            "nccl_unique_id_b64": unique, "rank_offset": 1, "world_size": 3, "packed": True, "packed_buffer_size_bytes": 16,
            "packed_num_buffers": 2,
        }
    }  # fmt: skip
    assert bodies[4] == {
        "update_info": {"names": list("abc"), "dtype_names": ["bfloat16"] * 3, "shapes": [[2, 3], [4], [5, 1]]}
    }
    assert spy.joined == [(UNIQUE, 3)]
    whole = [tensor.view(-1).view(torch.uint8).tolist() for tensor in tensors.tensors.values()]
    assert spy.sent == [whole[0] + whole[1], whole[2]]
    mark = bodies[2]["new_version"]
    send(sender, server.url, tensors, mark)
    send(sender, server.url, tensors, "7.run.tag", "7.run.tag")
    assert len(spy.joined) == 1 and [path for path, _ in server.posts[6:]] == list(paths[3:]) * 2
    assert spy.sent == [whole[0] + whole[1], whole[2]] * 3


def test_a_server_that_was_started_again_joins_again(server, tensors):
    spy = Spy()
    sender = Sender(spy)
    send(sender, server.url, tensors, "default")
    send(sender, server.url, tensors, "default", "7.run.tag")
    assert len(spy.joined) == 2 and spy.aborted == 1
    assert server.posts[1][0] == server.posts[7][0] == "/init_weight_transfer_engine"
    assert server.posts[2][1] != server.posts[8][1], "each start has a label of its own"


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/update_weights"])
def test_a_server_that_refuses_is_not_waited_for(server, tensors, path: str):
    """Our side of it would wait for ever."""
    spy = Spy()
    spy.hangs = path == "/init_weight_transfer_engine"
    sender = Sender(spy)
    server.statuses[path] = 400
    with pytest.raises(VllmError, match=rf"{path} says 400: so it is"):
        send(sender, server.url, tensors, "default")
    assert spy.aborted == (path == "/update_weights")


def test_a_server_that_takes_no_part_is_not_waited_for(server, tensors, monkeypatch):
    spy = Spy()
    sender = Sender(spy)
    send(sender, server.url, tensors, "default")
    monkeypatch.setattr(sender_module, "GRACE", 0.05)  # not before: a thread may be that late on a loaded machine
    spy.hangs = True
    with pytest.raises(VllmError, match="has answered and taken no part: is VLLM_DISABLE_PYNCCL set there"):
        send(sender, server.url, tensors, "7.run.tag", "7.run.tag")
    assert spy.aborted == 1


def test_what_nccl_says_is_told_where_the_server_says_nothing(server, tensors, monkeypatch):
    """And it is left with a part of the weights, so it gets no others."""
    spy = Spy()
    sender = Sender(spy)
    send(sender, server.url, tensors, "default")
    mark = server.posts[2][1]["new_version"]
    monkeypatch.setattr(sender_module, "GRACE", 0.05)  # not before: a thread may be that late on a loaded machine
    spy.fails = True
    server.slow = {"/update_weights"}
    with pytest.raises(VllmError, match="ncclBroadcast: remote process exited"):
        send(sender, server.url, tensors, mark)
    assert spy.aborted == 1
    with pytest.raises(VllmError, match="has got a part of the weights and not the rest: start it again"):
        send(sender, server.url, tensors, mark)


@contextlib.contextmanager
def two_ranks(tensors: HostTensors) -> Iterator[tuple[Fleet, Fleet, Weights, Asked]]:
    """The fleets of rank 0, which sends, and of another, and a server that has weights."""
    with served(Asked()) as server:
        options = VllmOptions(urls=(server.url,), weights="nccl", patience=30.0)
        ranks = [Fleet(options, [server.url], "key", recorded_probe(), sender=s) for s in (Sender(Spy()), None)]
        weights = Weights(Path("/nowhere"), 3, recorded_canary(), tensors)
        ranks[0].names = {server.url: "policy"}
        ranks[0].update(weights)
        ranks[1].names, ranks[1].run, ranks[1].tags = ranks[0].names, ranks[0].run, dict(ranks[0].tags)
        yield *ranks, weights, server


def test_another_rank_waits_until_rank_0_has_given_weights_again(tensors):
    """What a server without them has said meanwhile counts nothing."""
    with two_ranks(tensors) as (first, other, weights, server):
        server.faults = ["forget"]

        def mend() -> None:
            """Once the other has asked twice which weights there are, and waits."""
            until(lambda: server.asked["/weight_info"] >= known + 2)
            first.mend()

        known = server.asked["/weight_info"]
        mended = threading.Thread(target=mend)
        mended.start()
        requests = [
            Request([number, 9, 9], 6, SamplingParams(max_new_tokens=8, temperature=2.0, top_k=5))
            for number in (1, 2, 3)
        ]
        found = other.complete(requests, weights)
        mended.join()
        assert [len(samples) for samples in found] == [len(recorded("hot")["answer"]["choices"])] * 3
        assert server.tag == first.tags[server.url] == other.tags[server.url]
        assert [path for path, _ in server.posts].count("/update_weights") == 2
        assert server.asked["/v1/completions"] == 2 + 3 + 2 + 3, "two canaries, and each prompt twice"


def test_answers_before_rank_0_has_given_weights_again_are_asked_for_once_more(tensors):
    """On rank 0, whose keeper gives them while answers come."""
    with two_ranks(tensors) as (first, _, weights, server):
        tag, requests = server.tag, [Request([1, 9, 9], 6, SamplingParams(max_new_tokens=8, temperature=2.0, top_k=5))]
        inner = first._answer

        async def answer(http, call, weights):
            result = await inner(http, call, weights)
            if server.tag == tag:  # it was started again before it answered, and has its weights again since
                server.tag = "default"
                thread = threading.Thread(target=first.mend)
                thread.start()
                await asyncio.to_thread(thread.join)
            return result

        first._answer = answer
        (samples,) = first.complete(requests, weights)
        assert len(samples) == 6
        assert server.asked["/v1/completions"] == 2 + 1 + 2 + 1
