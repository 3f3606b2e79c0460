"""Bodies that are sent to vLLM, and what is believed of its answers: recorded ones, and what has been changed in them."""

from __future__ import annotations

import copy

import pytest

from megatron_ext.errors import UserError
from megatron_ext.rollouts import FinishReason, Request, SamplingParams
from megatron_ext.rollouts.vllm.protocol import (
    GivenUpError,
    ServerCall,
    VllmError,
    as_calls,
    check_request,
    completion_body,
    read_completion,
)
from tests.vllm_cases import recorded


def call_of(name: str) -> tuple[ServerCall, dict]:
    """The call that a recorded answer is to, and the answer."""
    record = recorded(name)
    body = record["body"]
    params = SamplingParams(
        max_new_tokens=body["max_tokens"],
        stop_token_ids=body["stop_token_ids"],
        stop_strings=body["stop"],
        use_greedy=body["temperature"] == 0,
        temperature=body["temperature"] or 1.0,
        top_k=body["top_k"],
    )
    (call,) = as_calls([Request(body["prompt"], body["n"], params)])
    assert completion_body("policy", call) == body, (
        "it was recorded with another body: run tests/programs/record_vllm.py"
    )
    return call, record["answer"]


@pytest.mark.parametrize("name", ["stop", "stop_string", "hot"])
def test_a_recorded_answer_is_read(name: str):
    call, answer = call_of(name)
    found = read_completion(answer, call, 12)
    assert len(found) == 6
    for sample, choice in zip(found, sorted(answer["choices"], key=lambda c: c["index"]), strict=True):
        assert sample.tokens == choice["token_ids"]
        assert sample.logprobs == choice["logprobs"]["token_logprobs"]
        assert sample.passages[0].weight_version == 12
        if sample.finish_reason is FinishReason.LENGTH:
            assert len(sample.tokens) == 8
        elif sample.finish_reason is FinishReason.STOP:
            assert sample.tokens[-1] in call.request.params.ends
    ends = {
        "stop": {FinishReason.STOP},
        "stop_string": {FinishReason.STOP_STRING, FinishReason.LENGTH},
        "hot": {FinishReason.LENGTH},
    }
    assert {sample.finish_reason for sample in found} == ends[name]


def test_the_order_of_choices_does_not_matter():
    call, answer = call_of("hot")
    turned = answer | {"choices": answer["choices"][::-1]}
    assert read_completion(turned, call, 0) == read_completion(answer, call, 0)


def broken(change) -> VllmError:
    call, answer = call_of("hot")
    answer = copy.deepcopy(answer)
    change(answer["choices"][2], answer["choices"])
    with pytest.raises(VllmError) as raised:
        read_completion(answer, call, 0)
    return raised.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c, all_: c["token_ids"].pop(), "7 tokens has 8 log-probabilities"),
        (lambda c, all_: c["logprobs"]["token_logprobs"].pop(), "8 tokens has 7 log-probabilities"),
        (lambda c, all_: c["prompt_token_ids"].append(1), "another prompt"),
        (lambda c, all_: (c["token_ids"].append(4), c["logprobs"]["token_logprobs"].append(-1.0)), "1 to 8 were asked"),
        (lambda c, all_: c["logprobs"]["token_logprobs"].__setitem__(0, float("nan")), "log-probability of nan"),
        (lambda c, all_: c["logprobs"]["token_logprobs"].__setitem__(0, None), "log-probability of None"),
        (lambda c, all_: c["logprobs"]["token_logprobs"].__setitem__(0, 0.5), "log-probability of 0.5"),
        (lambda c, all_: c["token_ids"].__setitem__(0, "what"), "not numbers"),
        (lambda c, all_: c.update(finish_reason="stop", stop_reason=3), "which ends none"),
        (lambda c, all_: c.update(finish_reason="stop", stop_reason=None), "--generation-config vllm"),
        (lambda c, all_: c.update(index=1), "6 samples were asked for"),
        (lambda c, all_: all_.pop(), "6 samples were asked for"),
        (lambda c, all_: all_.append(dict(c, index=6)), "6 samples were asked for"),
        (lambda c, all_: c.pop("token_ids"), "another version"),
        (lambda c, all_: c.update(logprobs=None), "another version"),
    ],
)  # fmt: skip
def test_what_is_not_what_was_asked_for_is_refused(change, words: str):
    assert words in str(broken(change))


def test_a_response_cut_off_too_early_names_the_flags():
    def cut(choice, _):
        choice["token_ids"], choice["logprobs"]["token_logprobs"] = choice["token_ids"][:3], [-1.0] * 3

    assert "cut a response off at 3 of 8 tokens" in str(broken(cut))


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_what_the_server_gave_up_is_worth_asking_again(reason: str):
    call, answer = call_of("hot")
    answer["choices"][0]["finish_reason"] = reason
    with pytest.raises(GivenUpError, match=reason):
        read_completion(answer, call, 0)


def test_samples_of_other_limits_are_other_calls():
    params = SamplingParams(max_new_tokens=9)
    requests = [Request([1, 2], 5, params).limited([9, 3, 9, 3, 1]), Request([3], 2, params)]
    calls = list(as_calls(requests))
    assert [(c.number, c.samples, c.limit) for c in calls] == [
        (0, (0, 2), 9), (0, (1, 3), 3), (0, (4,), 1), (1, (0, 1), 9),
    ]  # fmt: skip
    assert completion_body("m", calls[1])["max_tokens"] == 3


def test_greedy_samples_are_calls_of_their_own():
    """vLLM says "n must be 1 when using greedy sampling"."""
    calls = list(as_calls([Request([1, 2], 3, SamplingParams(max_new_tokens=9, use_greedy=True))]))
    assert [(c.samples, c.limit) for c in calls] == [((0,), 9), ((1,), 9), ((2,), 9)]


def test_every_parameter_is_named_so_that_the_server_fills_in_none():
    """Those that vLLM takes from generation_config.json where a request does not say them (`_DEFAULT_SAMPLING_PARAMS`)."""
    params = SamplingParams(
        5, stop_token_ids=(4, 2), temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2
    )
    (call,) = as_calls([Request([1], 1, params)])
    body = completion_body("m", call)
    said = {k: body[k] for k in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    assert said == {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    assert (body["presence_penalty"], body["frequency_penalty"], body["stop_token_ids"]) == (0, 0, [2, 4])
    (call,) = as_calls([Request([1], 1, SamplingParams(5, stop_token_ids=(4,), ignore_eos=True, use_greedy=True))])
    assert completion_body("m", call)["stop_token_ids"] == []
    assert completion_body("m", call)["temperature"] == 0


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([], 1, SamplingParams(3)), "empty"),
        (Request([1] * 8, 1, SamplingParams(3)), "exceeds model.encoder_seq_length=10"),
        (Request([1], 1, SamplingParams(3, use_greedy=True, temperature=0.5)), "leave temperature out"),
    ],
)
def test_what_a_server_would_answer_otherwise_is_refused(request_: Request, words: str):
    with pytest.raises(UserError, match=words):
        check_request(request_, 10)
    check_request(Request([1] * 8, 1, SamplingParams(3)).limited([2]), 10)
