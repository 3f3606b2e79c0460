"""Servers that fail, forget or lie: every response is counted once, or the run is told."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ext.rollouts import Request, SamplingParams
from megatron_ext.rollouts.vllm.checks import WrongWeightsError
from megatron_ext.rollouts.vllm.fleet import Fleet, Weights
from megatron_ext.rollouts.vllm.protocol import VllmError
from megatron_ext.vllm_servers.options import VllmOptions
from tests.vllm_cases import recorded
from tests.vllm_faults import Faulty, faulty_server, recorded_canary, recorded_probe

PARAMS = SamplingParams(max_new_tokens=8, temperature=2.0, top_k=5)


def requests(count: int) -> list[Request]:
    """The first token of each prompt is its number, and what the server says is its log-probability."""
    return [Request([number, 9, 9], 6, PARAMS) for number in range(1, count + 1)]


@contextlib.contextmanager
def fleet_of(count: int = 1, hopeless=lambda: None, **options) -> Iterator[tuple[Fleet, list[Faulty], Weights]]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(faulty_server()) for _ in range(count)]
        urls = tuple(server.url for server in servers)
        fleet = Fleet(VllmOptions(urls=urls, **({"patience": 30.0} | options)), urls, "key", recorded_probe(), hopeless)
        fleet.names = dict.fromkeys(urls, "policy")
        weights = Weights(Path("/somewhere"), 3, recorded_canary())
        fleet.update(weights)
        yield fleet, servers, weights


def check(found, count: int) -> None:
    expected = [choice["token_ids"] for choice in recorded("hot")["answer"]["choices"]]
    assert len(found) == count
    for number, samples in enumerate(found, 1):
        assert [sample.tokens for sample in samples] == expected
        assert {value for sample in samples for value in sample.logprobs} == {-float(number)}
        assert {sample.passages[0].weight_version for sample in samples} == {3}


def test_whatever_goes_wrong_on_the_way_each_response_comes_once():
    with fleet_of() as (fleet, (server,), weights):
        server.faults = [503, "reset", "cut", "no json", 500, 429]
        check(fleet.complete(requests(5), weights), 5)
        assert not server.faults
        assert server.asked["/v1/completions"] == 2 + 5 + 6  # the canary's two, the calls, those that failed


def test_calls_of_a_server_that_is_gone_move_to_another():
    with fleet_of(2) as (fleet, (first, second), weights):
        first.shutdown()
        first.server_close()
        before = second.asked["/v1/completions"]
        check(fleet.complete(requests(4), weights), 4)
        assert second.asked["/v1/completions"] - before == 4


def test_prompts_are_spread_over_servers():
    with fleet_of(2) as (fleet, servers, weights):
        check(fleet.complete(requests(6), weights), 6)
        assert [server.asked["/v1/completions"] for server in servers] == [2 + 3, 2 + 3]


def test_answers_of_a_server_that_was_started_again_are_asked_for_once_more():
    """It lost its tag somewhere on the way: nobody can say which answers are of the old weights."""
    with fleet_of() as (fleet, (server,), weights):
        server.faults = [503, "forget"]
        check(fleet.complete(requests(5), weights), 5)
        assert server.asked["/collective_rpc"] == 2, "it must get the newest weights before it is asked again"
        assert server.asked["/v1/completions"] == 2 + 6 + 2 + 5


def test_weights_that_a_peer_has_given_are_believed_but_not_what_came_before():
    with fleet_of() as (fleet, (server,), weights):
        server.tag = "3.another"
        check(fleet.complete(requests(5), weights), 5)
        assert server.asked["/collective_rpc"] == 1
        assert server.asked["/v1/completions"] == 2 + 2 * 5


def test_a_server_that_forgets_again_and_again_stops_the_run():
    with fleet_of() as (fleet, (server,), weights):
        server.faults = ["forget"] * 100
        with pytest.raises(VllmError, match="lost their weights 5 times"):
            fleet.complete(requests(1), weights)


def test_a_server_that_is_gone_at_an_update_is_left_out(monkeypatch):
    monkeypatch.setattr("megatron_ext.rollouts.vllm.fleet.SHORT_PATIENCE", 0.2)
    with fleet_of(2) as (fleet, (first, second), weights):
        first.shutdown()
        first.server_close()
        fleet.update(weights)
        assert fleet.down == {first.url}
        before = second.asked["/v1/completions"]
        check(fleet.complete(requests(4), weights), 4)
        assert second.asked["/v1/completions"] - before == 4


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "MEGATRON_EXT_VLLM_KEY"), (404, "VLLM_SERVER_DEV_MODE=1"), (400, "so it is")],
)
def test_what_asking_again_cannot_mend_is_told_at_once(status: int, words: str):
    with fleet_of() as (fleet, (server,), weights):
        server.faults = [status]
        with pytest.raises(VllmError, match=words):
            fleet.complete(requests(1), weights)


def test_patience_ends():
    with fleet_of(patience=0.5) as (fleet, (server,), weights):
        server.faults = [503] * 100
        with pytest.raises(VllmError, match=r"503.*rollout.patience"):
            fleet.complete(requests(1), weights)


def test_nobody_waits_for_servers_that_are_given_up():
    with fleet_of(hopeless=lambda: "all have ended 4 times") as (fleet, (server,), weights):
        server.faults = [503]
        with pytest.raises(VllmError, match="ended 4 times"):
            fleet.complete(requests(1), weights)


def test_a_canary_that_differs_stops_the_run_with_the_number():
    with fleet_of() as (fleet, _, weights):
        canary = weights.canary
        off = dataclasses.replace(canary, expected=tuple(x - 2e-4 for x in canary.expected))
        with pytest.raises(WrongWeightsError, match=r"differ from the trainer's by 0\.0002 nats"):
            fleet.update(dataclasses.replace(weights, canary=off))
        near = dataclasses.replace(canary, expected=tuple(x - 0.9e-4 for x in canary.expected))
        fleet.update(dataclasses.replace(weights, canary=near))


def test_a_cache_of_older_weights_kills_the_canary():
    """The text itself is as it should be, what is sampled behind it is not."""
    with fleet_of() as (fleet, _, weights):
        other = torch.full((32,), -0.5)
        with pytest.raises(WrongWeightsError, match="cached from older weights"):
            fleet.update(
                dataclasses.replace(weights, canary=dataclasses.replace(weights.canary, behind=other, unscaled=other))
            )


def test_log_probabilities_from_before_the_temperature_are_named():
    with fleet_of() as (fleet, _, weights):
        canary = dataclasses.replace(weights.canary, behind=torch.full((32,), -0.5))
        with pytest.raises(VllmError, match="--logprobs-mode processed_logprobs"):
            fleet.update(dataclasses.replace(weights, canary=canary))


def test_a_server_that_fits_is_taken():
    with fleet_of() as (fleet, (server,), _):
        fleet.names = {}
        fleet.introduce()
        assert fleet.names == {server.url: "policy"}


@pytest.mark.parametrize(
    ("path", "status", "change", "words"),
    [
        ("/version", 200, {"version": "0.31.2"}, "is vLLM 0.31.2: 0.32 or newer is needed"),
        ("/tokenize", 200, {"tokens": [1, 2, 3]}, "another tokenizer"),
        ("/v1/models", 200, {"data": [recorded("models")["answer"]["data"][0] | {"max_model_len": 255}]}, "--max-model-len 256"),
        ("/weight_info", 404, recorded("unknown_route")["answer"], "VLLM_SERVER_DEV_MODE=1"),
        ("/version", 401, recorded("wrong_key")["answer"], "MEGATRON_EXT_VLLM_KEY"),
        ("/tokenize", 400, recorded("too_long")["answer"], "maximum context length"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_fit_is_refused_in_one_line(path: str, status: int, change: dict, words: str):
    with fleet_of() as (fleet, (server,), _):
        server.records[path] = status, server.records[path][1] | change
        with pytest.raises(VllmError, match=words) as raised:
            fleet.introduce()
        assert "\n" not in str(raised.value)
