"""Experts that a server's routers chose: read beside its answers, carried over turns and cuts, missed where it tells none."""

from __future__ import annotations

import base64
import copy

import numpy as np
import pytest

from megatron_ext.grouping.routes import RouteShape, write_routes
from megatron_ext.rollouts import FinishReason, Passage, Request, SamplingParams, Trajectory
from megatron_ext.rollouts.vllm.flight import _beginning
from megatron_ext.rollouts.vllm.protocol import ServerCall, VllmError, as_calls, read_completion
from megatron_ext.rollouts.vllm.spans import read_generated
from tests.vllm_cases import recorded

SHAPE = RouteShape(layers=3, topk=2, experts=300)


def drawn(tokens: int) -> np.ndarray:
    """As a server of 300 experts has them."""
    return np.random.default_rng().integers(0, 300, (tokens - 1, 3, 2)).astype(np.uint16)


def answered(name: str) -> tuple[ServerCall, dict, list[np.ndarray]]:
    """A recorded answer with routes."""
    record = recorded(name)
    body, answer = record["body"], copy.deepcopy(record["answer"])
    params = SamplingParams(body["max_tokens"], temperature=body["temperature"], ignore_eos=True)
    (call,) = as_calls([Request(body["prompt"], body["n"], params)])
    routes = []
    for choice in answer["choices"]:
        routes.append(drawn(len(call.prompt) + len(choice["token_ids"])))
        choice["routed_experts"] = write_routes(routes[-1])
    return call, answer, [routes[i] for i in np.argsort([choice["index"] for choice in answer["choices"]])]


def test_routes_are_read_beside_tokens():
    call, answer, routes = answered("hot")
    found = read_completion(answer, call, 3, SHAPE)
    assert all(np.array_equal(t.routes, expected) for t, expected in zip(found, routes, strict=True))
    assert all(t.routes is None for t in read_completion(answer, call, 3)), "nobody asks"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (None, "start it with --enable-return-routed-experts"),
        ("a", "no .npy file in base64"),
        (7, "no .npy file in base64"),
        (base64.b64encode(b"what").decode(), "no .npy file in base64"),
        (write_routes(drawn(5)), r"are uint16 \[4, 3, 2\], not integers"),
        (write_routes(drawn(5).astype(float)), "are float64"),
    ],
)
def test_what_is_missing_or_of_another_model_is_refused(told, words: str):
    call, answer, _ = answered("hot")
    answer["choices"][1]["routed_experts"] = told
    with pytest.raises(VllmError, match=words):
        read_completion(answer, call, 3, SHAPE)
    smaller = RouteShape(SHAPE.layers, SHAPE.topk, 5)
    with pytest.raises(VllmError, match="name expert [0-9]+, and the model has 5"):
        read_completion(answered("hot")[1], call, 3, smaller)


def generated(tokens: list[int], finish: str, routes: np.ndarray | None) -> dict:
    """An answer of the other route, all of weights "a"."""
    told = [{"token_id": token, "logprob": -1.0} for token in tokens]
    span = {"start": 0, "end": len(tokens), "version": "a"}
    return {
        "index": 0, "token_ids": tokens, "logprobs": {"content": told}, "finish_reason": finish, "stop_reason": None,
        "weight_versions": [span], "routed_experts": None if routes is None else write_routes(routes),
    }  # fmt: skip


def test_what_is_aborted_has_none_and_what_goes_on_has_those_of_all():
    (call,) = as_calls([Request([1, 2, 3], 1, SamplingParams(4, ignore_eos=True))])

    def read(call: ServerCall, *choices: dict) -> Trajectory:
        answer = {"prompt_token_ids": call.prompt, "choices": [*choices]}
        (found,) = read_generated(answer, call, {"a": 1}.get, SHAPE)
        return found

    assert read(call, generated([5, 6], "abort", None)).routes is None
    rest, expected = ServerCall(0, call.request, (0,), 2, said=(5, 6)), drawn(7)
    assert np.array_equal(read(rest, generated([7, 8], "length", expected)).routes, expected)
    with pytest.raises(VllmError, match="does not tell which experts"):
        read(rest, generated([7, 8], "length", None))


def test_a_response_that_is_cut_loses_the_routes_of_what_it_loses():
    routes = drawn(3 + 5)
    passages = Passage((4, 5, 6), (-1.0,) * 3, 1), Passage((7, 8), (-1.0,) * 2, 2)
    cut = _beginning(Trajectory(passages, FinishReason.LENGTH, routes), 4)
    assert cut.tokens == [4, 5, 6, 7] and np.array_equal(cut.routes, routes[:6])
