"""What is said to a vLLM server about responses that may outlive its weights, and what is believed of its answers.

POST /inference/v1/generate (`--enable-scale-out`), fields as of vLLM 0.32: token ids in, token ids out, and for tokens in a row
the label of the weights that sampled it, which /update_weight_version sets while the server is paused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_ext.grouping.routes import RouteShape
from megatron_ext.rollouts.trajectories import FinishReason, Passage, Trajectory
from megatron_ext.rollouts.vllm.protocol import (
    GivenUpError,
    ServerCall,
    VllmError,
    check_tokens,
    completion_body,
    read_routes,
    reason_of,
)

__all__ = ["FIRST", "ROUTE", "ForgottenError", "generate_body", "probe_body", "read_generated", "read_label"]

ROUTE = "/inference/v1/generate"
# The priority of what the run waits for; higher numbers come later. A server without priorities refuses all but 0.
FIRST = -1
# Of a completion: the rest is what vLLM calls sampling parameters, under the same names.
NOT_OF_SAMPLING = ("model", "prompt", "return_token_ids")


class ForgottenError(GivenUpError):
    """Weights that this run has not given have sampled: the server was started again."""


def generate_body(model: str, call: ServerCall, priority: int) -> dict[str, Any]:
    """The same as `completion_body`, for the other route."""
    body = completion_body(model, call)
    params = {name: value for name, value in body.items() if name not in NOT_OF_SAMPLING}
    return {
        "model": model, "token_ids": body["prompt"], "sampling_params": params, "return_token_ids": True,
        "priority": priority,
    }  # fmt: skip


def probe_body(model: str) -> dict[str, Any]:
    """Asks for one token, whatever it is."""
    params = {"max_tokens": 1, "ignore_eos": True, "logprobs": 0}
    return {"model": model, "token_ids": [0], "sampling_params": params, "return_token_ids": True, "priority": FIRST}


def read_label(answer: Any) -> str:
    """Of the weights that have answered `probe_body`."""
    try:
        ((span,),) = [choice["weight_versions"] for choice in answer["choices"]]
        return span["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise _other_form(error) from error


def read_generated(
    answer: Any, call: ServerCall, version_of: Callable[[str], int | None], routes: RouteShape | None = None
) -> list[Trajectory]:
    """What each sample of a call has said since `call.said`, a passage for each version of the weights; FinishReason.ABORTED: it
    can go on, and may have said nothing yet.

    Args:
        version_of: how many updates the weights of a label have had; None: they are not this run's.
        routes: see `read_completion`; what is aborted has none yet.

    Raises:
        ForgottenError: see there.
        VllmError: anything in the answer that is not what was asked for.
    """
    try:
        if answer["prompt_token_ids"] != call.prompt:
            raise VllmError("the answer is to another prompt than the tokens that were sent")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if (found := [choice["index"] for choice in choices]) != list(range(len(call.samples))):
            raise VllmError(f"{len(call.samples)} samples were asked for, the answer has those of numbers {found}")
        return [_trajectory(choice, call, version_of, routes) for choice in choices]
    except (KeyError, TypeError, AttributeError) as error:
        raise _other_form(error) from error


def _trajectory(
    choice: dict[str, Any], call: ServerCall, version_of: Callable[[str], int | None], routes: RouteShape | None
) -> Trajectory:
    params, finish, tokens = call.request.params, choice["finish_reason"], choice["token_ids"] or []
    told = choice["logprobs"]["content"] or []
    if finish == "error":
        raise GivenUpError("a response was given up (error)")
    logprobs = [entry["logprob"] for entry in told]
    aborted = finish == "abort"
    check_tokens(tokens, logprobs, 0 if aborted else 1, call.limit - aborted)
    if [entry["token_id"] for entry in told] != tokens:
        raise VllmError("the log-probabilities of a response are of other tokens than it has")
    passages, place = [], 0
    for span in choice["weight_versions"] or []:
        start, end, label = span["start"], span["end"], span["version"]
        if start != place or end < start:
            raise VllmError(f"weights {label!r} have sampled tokens {start} to {end}, behind those to {place}")
        if start == end:
            continue
        if (version := version_of(label)) is None:
            raise ForgottenError(f"weights {label!r} have sampled, which this run has not given")
        passages.append(Passage(tokens[start:end], logprobs[start:end], version))
        place = end
    if place != len(tokens):
        raise VllmError(f"of a response of {len(tokens)} tokens the server tells the weights of {place}")
    if aborted:
        return Trajectory(passages, FinishReason.ABORTED)
    reason = reason_of(finish, choice["stop_reason"], tokens, call.limit, params)
    return Trajectory(passages, reason, read_routes(choice, call, tokens, routes))


def _other_form(error: Exception) -> VllmError:
    return VllmError(
        f"the answer of {ROUTE} is not of the form that vLLM 0.32 gives ({type(error).__name__}: {error}); is it a vLLM of "
        "another version?"
    )
