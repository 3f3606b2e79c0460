"""Responses that are in flight when new weights come: every token once, with the version of the weights that sampled it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.rollouts import FinishReason, Request, SamplingParams, Trajectory
from megatron_ext.rollouts.vllm import flight as flight_module
from megatron_ext.rollouts.vllm.checks import WrongWeightsError
from megatron_ext.rollouts.vllm.fleet import Fleet, Weights
from megatron_ext.rollouts.vllm.flight import Flight, Keeper, Turns
from megatron_ext.rollouts.vllm.protocol import VllmError
from megatron_ext.vllm_servers.options import VllmOptions
from tests.vllm_faults import recorded_canary, recorded_probe
from tests.vllm_pausing import Pausing, pausing_server, token_of

LENGTH = 12
PARAMS = SamplingParams(max_new_tokens=LENGTH)
SECONDS = 300


def letters(prompt: list[int], tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


class Served:
    """Servers with weights that have had 3 updates, and what asks them."""

    def __init__(self, servers: list[Pausing], first: int = 0, **options):
        urls = tuple(server.url for server in servers)
        self.servers = servers
        self.fleet = Fleet(VllmOptions(urls=urls, **({"patience": 30.0} | options)), urls, "key", recorded_probe())
        self.fleet.names = dict.fromkeys(urls, "policy")
        self.update(3)
        self.flight = Flight(self.fleet, letters, first)

    def update(self, version: int, in_flight: str = "abort") -> None:
        self.fleet.update(Weights(Path("/somewhere"), version, recorded_canary()), in_flight)


@contextlib.contextmanager
def served(count: int = 1, **options) -> Iterator[Served]:
    with contextlib.ExitStack() as stack:
        made = Served([stack.enter_context(pausing_server()) for _ in range(count)], **options)
        stack.callback(made.flight.close)
        yield made


def request(samples: int = 3, params: SamplingParams = PARAMS) -> Request:
    return Request([3, 9, 9], samples, params)


def lengths(trajectory: Trajectory) -> list[tuple[int, int]]:
    return [(p.weight_version, len(p.tokens)) for p in trajectory.passages]


def check(found: list[list[Trajectory]], count: int, samples: int = 3) -> list[list[tuple[int, int]]]:
    """Each token once, with the log-probability that its version has; gives the versions."""
    assert [len(group) for group in found] == [samples] * count
    for trajectory in (t for group in found for t in group):
        assert trajectory.tokens == [token_of(place) for place in range(LENGTH)]
        assert trajectory.finish_reason is FinishReason.LENGTH
        for passage in trajectory.passages:
            assert set(passage.logprobs) == {-float(passage.weight_version)}
    return [lengths(t) for group in found for t in group]


def test_requests_that_are_kept_go_on_with_the_new_weights():
    with served() as s:
        (server,) = s.servers
        begun = s.flight.begin([request(), request()], 3)
        server.wait_for(2)
        server.speak(5, 4, 0)
        s.update(4, "keep")
        server.speak(2)
        s.update(5, "keep")
        server.speak(LENGTH)
        found = check(begun.result(SECONDS), 2)
        assert found == 2 * [[(3, 5), (4, 2), (5, 5)], [(3, 4), (4, 2), (5, 6)], [(4, 2), (5, 10)]]
        assert len(server.bodies) == 2, "nothing was asked again"


def test_requests_that_are_aborted_are_continued_where_they_were():
    with served() as s:
        (server,) = s.servers
        begun = s.flight.begin([request(5)], 3)
        server.wait_for(1)
        server.speak(5, 4, 0, 0, LENGTH)
        s.update(4, "abort")
        server.wait_for(3)  # two that have said something, and the two silent ones together
        asked = server.bodies[1:]
        said = {len(b["token_ids"]) - 3: (b["sampling_params"]["max_tokens"], b["sampling_params"]["n"]) for b in asked}
        assert said == {5: (7, 1), 4: (8, 1), 0: (12, 2)}
        for body in asked:
            assert body["token_ids"] == [3, 9, 9, *(token_of(i) for i in range(len(body["token_ids"]) - 3))]
        server.speak(1)
        s.update(5, "abort")
        server.wait_for(4)
        server.speak(LENGTH)
        found = check(begun.result(SECONDS), 1, 5)
        assert found == [[(3, 5), (4, 1), (5, 6)], [(3, 4), (4, 1), (5, 7)], *2 * [[(4, 1), (5, 11)]], [(3, 12)]]


def test_what_a_killed_server_had_said_is_said_again_and_counted_once():
    with served() as s:
        (server,) = s.servers
        begun = s.flight.begin([request(1), request(1)], 3)
        server.wait_for(2)
        server.speak(5)
        s.update(4, "abort")
        server.wait_for(2)
        server.speak(3)
        server.end("killed")
        server.wait_for(2)
        assert [len(b["token_ids"]) for b in server.bodies] == [3, 3, 8, 8, 8, 8], "what had come before is kept"
        server.speak(LENGTH)
        assert check(begun.result(SECONDS), 2, 1) == 2 * [[(3, 5), (4, 7)]]


def test_what_other_weights_have_sampled_is_thrown_away_and_the_server_gets_the_newest(monkeypatch):
    """It was started again and nobody has seen it: its first answers are those of the weights that it began with."""
    monkeypatch.setattr(flight_module, "PAUSE", 0.05)
    with served() as s:
        (server,) = s.servers
        server.tag = "default"
        begun = s.flight.begin([request()], 3)
        server.wait_for(1)
        server.speak(LENGTH)
        server.wait_for(1)
        keeper = Keeper(s.fleet)
        try:
            while server.tag == "default":  # the keeper looks every 0.05 s
                threading.Event().wait(0.01)
            server.wait_for(1)
            server.speak(LENGTH)
            assert check(begun.result(SECONDS), 1) == 3 * [[(3, 12)]]
            keeper.check()
        finally:
            keeper.close()


def test_a_server_that_cannot_get_its_weights_stops_the_run(monkeypatch):
    monkeypatch.setattr(flight_module, "PAUSE", 0.01)
    with served() as s:
        canary = recorded_canary()
        off = replace(canary, expected=tuple(x - 1 for x in canary.expected))
        with pytest.raises(WrongWeightsError):
            s.fleet.update(Weights(Path("/somewhere"), 4, off))
        s.servers[0].tag = "default"
        keeper = Keeper(s.fleet)
        keeper._thread.join(SECONDS)
        with pytest.raises(WrongWeightsError, match="has not the trainer's weights"):
            keeper.check()


def test_tokens_of_too_old_weights_are_asked_for_again():
    """Of a server that an update did not reach."""
    with served() as s:
        (server,) = s.servers
        begun = s.flight.begin([request()], 4)
        server.wait_for(1)
        server.speak(LENGTH)
        server.wait_for(1)
        s.update(4, "keep")
        server.speak(LENGTH)
        assert check(begun.result(SECONDS), 1) == 3 * [[(4, 12)]]


def test_a_stop_string_that_two_requests_say_together_ends_the_response():
    text = "".join(chr(token_of(i)) for i in range(LENGTH))
    with served() as s:
        (server,) = s.servers
        params = SamplingParams(max_new_tokens=LENGTH, stop_strings=(text[3:5], "never"))
        begun = s.flight.begin([request(2, params)], 3)
        server.wait_for(1)
        server.speak(4, 5)
        s.update(4, "abort")
        server.wait_for(2)
        server.speak(LENGTH)
        ((first, second),) = begun.result(SECONDS)
        assert (lengths(first), lengths(second)) == ([(3, 4), (4, 1)], [(3, 5)])
        assert {first.finish_reason, second.finish_reason} == {FinishReason.STOP_STRING}


def test_prompts_go_to_the_server_that_has_least_to_do_and_replicas_begin_at_different_ones():
    with served(2, first=1) as s:
        left, right = s.servers
        slow = s.flight.begin([request()], 3)
        right.wait_for(1)
        more = s.flight.begin([request(1) for _ in range(3)], 3)
        left.wait_for(3)
        assert len(right.bodies) == 1, "three samples of one prompt are as much as one of three"
        for server in (left, right):
            server.speak(LENGTH)
        check(slow.result(SECONDS), 1)
        check(more.result(SECONDS), 3, 1)


def test_when_a_server_is_gone_another_answers():
    with served(2) as s:
        left, right = s.servers
        begun = s.flight.begin([request()], 3)
        left.wait_for(1)
        left.shutdown()
        left.server_close()
        left.end("killed")
        right.wait_for(1)
        right.speak(LENGTH)
        check(begun.result(SECONDS), 1)


def test_what_cannot_be_mended_is_told_where_it_is_waited_for():
    with served() as s:
        s.servers[0].refusal = 400
        with pytest.raises(VllmError, match="so it is"):
            s.flight.begin([request(), request()], 3).result(SECONDS)


def test_nothing_is_left_of_what_is_given_up():
    with served() as s:
        begun = s.flight.begin([request(), request()], 3)
        s.servers[0].wait_for(2)
        s.flight.close()
        assert begun.done() and not s.flight._thread.is_alive()


def test_the_oldest_are_next():
    async def order() -> list[int]:
        turns, found = Turns(2), []

        async def one(rank: int) -> None:
            async with turns.turn(rank):
                found.append(rank)
                await asyncio.sleep(0)

        tasks = [asyncio.ensure_future(one(rank)) for rank in (7, 7, 5, 3, 5, 1)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert turns._free == 2
        return found

    assert asyncio.run(order()) == [7, 7, 1, 3, 5]
