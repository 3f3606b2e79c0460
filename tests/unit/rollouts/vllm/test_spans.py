"""Answers that tell for each token whose weights sampled it: a recorded one, and what has been changed in it."""

from __future__ import annotations

import copy

import pytest

from megatron_ext.rollouts import FinishReason, Request, SamplingParams
from megatron_ext.rollouts.vllm.protocol import GivenUpError, ServerCall, VllmError, as_calls
from megatron_ext.rollouts.vllm.spans import ForgottenError, generate_body, read_generated, read_label
from tests.vllm_cases import recorded


def recorded_call(said: int = 0) -> tuple[ServerCall, dict]:
    """It lived through one update of the weights and was ended by the next.

    Args:
        said: how many tokens of the prompt were said before.
    """
    record = recorded("spans")
    ids, params = record["body"]["token_ids"], record["body"]["sampling_params"]
    cut = len(ids) - said
    (call,) = as_calls([Request(ids[:cut], params["n"], SamplingParams(params["max_tokens"]))])
    call = ServerCall(call.number, call.request, call.samples, call.limit, tuple(ids[cut:]))
    assert generate_body("policy", call, 0) == record["body"], "it was recorded with another body"
    return call, record["answer"]


def version_of(label: str) -> int:
    return int(label.partition(".")[0])


@pytest.mark.parametrize("said", [0, 2])
def test_a_recorded_answer_is_read(said: int):
    call, answer = recorded_call(said)
    found = read_generated(answer, call, version_of)
    for part, choice in zip(found, answer["choices"], strict=True):
        assert part.finish_reason is FinishReason.ABORTED and part.tokens == choice["token_ids"]
        assert part.logprobs == [entry["logprob"] for entry in choice["logprobs"]["content"]]
        ends = [span["end"] - span["start"] for span in choice["weight_versions"]]
        assert [(p.weight_version, len(p.tokens)) for p in part.passages] == list(zip((0, 1), ends, strict=True))


def test_one_that_was_ended_before_it_said_anything_is_empty():
    call, answer = recorded_call()
    answer = copy.deepcopy(answer)
    answer["choices"][1] |= {"token_ids": [], "logprobs": {"content": []}, "weight_versions": []}
    assert [len(part.passages) for part in read_generated(answer, call, version_of)] == [2, 0]


def test_weights_that_are_not_the_runs_are_told():
    call, answer = recorded_call()
    with pytest.raises(ForgottenError, match="'1.run.tag' have sampled"):
        read_generated(answer, call, lambda label: None if label == "1.run.tag" else 0)
    assert issubclass(ForgottenError, GivenUpError), "it is asked again"


def with_spans(*spans: tuple[int, int]):
    return lambda c, a: c.update(weight_versions=[{"version": "1.a", "start": s, "end": e} for s, e in spans])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c, a: c.update(weight_versions=None), "tells the weights of 0"),
        (with_spans((0, 50)), "tells the weights of 50"),
        (with_spans((0, 50), (51, 72)), "tokens 51 to 72, behind those to 50"),
        (with_spans((0, 50), (50, 40)), "tokens 50 to 40"),
        (lambda c, a: c["token_ids"].pop(), "71 tokens has 72 log-probabilities"),
        (lambda c, a: c["logprobs"]["content"][3].update(token_id=999), "of other tokens than it has"),
        (lambda c, a: c["logprobs"]["content"][3].update(logprob=0.5), "log-probability of 0.5"),
        (lambda c, a: c.update(index=0), "2 samples were asked for"),
        (lambda c, a: a["prompt_token_ids"].append(1), "another prompt"),
        (lambda c, a: c.update(logprobs=None), "another version"),
        (lambda c, a: a.pop("prompt_token_ids"), "another version"),
        (lambda c, a: c.update(finish_reason="length"), "cut a response off at 72 of 240 tokens"),
        (lambda c, a: c.update(finish_reason="stop"), "which ends none"),
    ],
)  # fmt: skip
def test_what_is_not_what_was_asked_for_is_refused(change, words: str):
    call, answer = recorded_call()
    answer = copy.deepcopy(answer)
    change(answer["choices"][1], answer)
    with pytest.raises(VllmError, match=words):
        read_generated(answer, call, version_of)


def test_the_label_of_the_weights_is_read_from_any_answer():
    choice = {"weight_versions": [{"version": "default", "start": 0, "end": 1}]}
    assert read_label({"choices": [choice]}) == "default"
    with pytest.raises(VllmError, match="another version"):
        read_label({"choices": [{"weight_versions": None}]})
