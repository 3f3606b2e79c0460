"""What is said to a vLLM server about responses, and what is believed of its answers.

POST /v1/completions with token ids, answered with token ids (`return_token_ids`) and the log-probability of each
(`logprobs: 0`); fields as of vLLM 0.32. Whatever of an answer can be compared with what was asked is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.grouping.routes import RouteShape
from megatron_ext.rollouts.requests import Request, SamplingParams
from megatron_ext.rollouts.trajectories import FinishReason, Trajectory

__all__ = [
    "GivenUpError", "ServerCall", "VllmError", "as_calls", "check_request", "check_tokens", "completion_body", "in_order",
    "read_completion", "read_routes", "reason_of",
]  # fmt: skip


NO_ROUTES = (
    "the server does not tell which experts its routers choose (trainer.grpo.router_replay=R3): start it with "
    "--enable-return-routed-experts and VLLM_USE_V2_MODEL_RUNNER=1, on a GPU; on CPUs, where vLLM has no such runner, set "
    "router_replay=R2"
)


class VllmError(UserError):
    """A server that cannot be trained from: it says what cannot be, or is another than the run needs."""


class GivenUpError(Exception):
    """A server gave a request up: it is asked again, here or elsewhere."""


@dataclass(frozen=True)
class ServerCall:
    """One HTTP request: samples of one prompt that have the same limit.

    Attributes:
        number: of the request that it is a part of; all calls of one go to one server while that lives.
        samples: numbers of the samples, in order.
        limit: the most tokens that each may have.
        said: what its one sample has said before; `limit` is what it has left.
    """

    number: int
    request: Request
    samples: tuple[int, ...]
    limit: int
    said: tuple[int, ...] = ()

    @property
    def prompt(self) -> list[int]:
        """What is continued."""
        return [*self.request.prompt, *self.said]


def as_calls(requests: Sequence[Request]) -> Iterator[ServerCall]:
    """A server has one limit for all samples of a call, so samples of other limits are other calls; and greedy ones come
    alone."""
    for number, request in enumerate(requests):
        samples_of: dict[tuple[int, int], list[int]] = {}
        for sample in range(request.samples):
            alone = sample if request.params.use_greedy else 0
            samples_of.setdefault((alone, request.limit(sample)), []).append(sample)
        for (_, limit), samples in samples_of.items():
            yield ServerCall(number, request, tuple(samples), limit)


def check_request(request: Request, max_length: int) -> None:
    """
    Raises:
        UserError: media, an empty prompt, a prompt whose longest response would exceed `max_length` tokens, or what the server
            would answer otherwise than our sampler.
    """
    prompt, params = request.prompt, request.params
    if hasattr(prompt, "tokens"):
        raise UserError("trainer.grpo.rollout.source=vllm samples text alone, a prompt has media: use source=megatron")
    if not len(prompt):
        raise UserError("a prompt is empty: there is nothing to continue")
    longest = max(map(request.limit, range(request.samples)))
    if len(prompt) + longest > max_length:
        raise UserError(
            f"a prompt of {len(prompt)} tokens with a response of {longest} exceeds model.encoder_seq_length={max_length}"
        )
    if params.use_greedy and params.temperature != 1:
        raise UserError(
            f"use_greedy with temperature={params.temperature}: vLLM gives greedy log-probabilities at 1 alone; leave "
            "temperature out"
        )


def completion_body(model: str, call: ServerCall) -> dict[str, Any]:
    """Every parameter is named, those that change nothing too: what is left out, the server may fill in from the
    generation_config.json of its model. Ends are ours alone (`ignore_eos` stops at no token by itself)."""
    params = call.request.params
    return {
        "model": model,
        "prompt": call.prompt,
        "n": len(call.samples),
        "max_tokens": call.limit,
        "temperature": 0.0 if params.use_greedy else params.temperature,
        "top_k": 0 if params.use_greedy else params.top_k,
        "top_p": 1.0 if params.use_greedy else params.top_p,
        "min_p": 0.0 if params.use_greedy else params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(params.ends),
        "stop": list(params.stop_strings),
        "include_stop_str_in_output": True,  # the text is not read, but tokens are cut off with it otherwise
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }


def read_completion(
    answer: Any, call: ServerCall, weight_version: int | None, routes: RouteShape | None = None
) -> list[Trajectory]:
    """The samples of a call, in order.

    Args:
        routes: the server tells which experts its routers chose; None: nobody asks.

    Raises:
        GivenUpError: the server ended one before its time, e.g. because it was paused.
        VllmError: anything in the answer that is not what was asked for.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if (found := [choice["index"] for choice in choices]) != list(range(len(call.samples))):
            raise VllmError(f"{len(call.samples)} samples were asked for, the answer has those of numbers {found}")
        return [_trajectory(choice, call, weight_version, routes) for choice in choices]
    except (KeyError, TypeError, AttributeError) as error:
        raise VllmError(
            f"the answer to a completion is not of the form that vLLM 0.32 gives ({type(error).__name__}: {error}); is it a "
            "vLLM of another version?"
        ) from error


def _trajectory(
    choice: dict[str, Any], call: ServerCall, weight_version: int | None, routes: RouteShape | None
) -> Trajectory:
    params, limit = call.request.params, call.limit
    if choice["finish_reason"] in ("abort", "error"):
        raise GivenUpError(f"a response was given up ({choice['finish_reason']})")
    if choice["prompt_token_ids"] != call.prompt:
        raise VllmError("the answer is to another prompt than the tokens that were sent")
    tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    check_tokens(tokens, logprobs, 1, limit)
    reason = reason_of(choice["finish_reason"], choice["stop_reason"], tokens, limit, params)
    return Trajectory.of_response(tokens, logprobs, reason, weight_version, read_routes(choice, call, tokens, routes))


def read_routes(
    choice: dict[str, Any], call: ServerCall, tokens: list[int], routes: RouteShape | None
) -> np.ndarray | None:
    """Of the prompt and all that has been said, with these tokens at its end; None: nobody asks.

    Raises:
        VllmError: the server does not tell them, or those of another model.
    """
    if routes is None:
        return None
    if (text := choice.get("routed_experts")) is None:
        raise VllmError(NO_ROUTES)
    try:
        return routes.read(text, len(call.prompt) + len(tokens))
    except UserError as error:
        raise VllmError(str(error)) from error


def check_tokens(tokens: list[int], logprobs: list[float], least: int, most: int) -> None:
    """
    Raises:
        VllmError: not as many as they may be, or not with one finite log-probability for each.
    """
    if not all(type(token) is int for token in tokens):
        raise VllmError("the tokens of a response are not numbers")
    if len(logprobs) != len(tokens):
        raise VllmError(f"a response of {len(tokens)} tokens has {len(logprobs)} log-probabilities, not as many")
    if not least <= len(tokens) <= most:
        raise VllmError(f"a response has {len(tokens)} tokens, {least} to {most} were asked for")
    if bad := [x for x in logprobs if not isinstance(x, (int, float)) or not math.isfinite(x) or x > 1e-3]:
        raise VllmError(f"a response has a log-probability of {bad[0]}")


def reason_of(
    finish: str, stop: int | str | None, tokens: list[int], limit: int, params: SamplingParams
) -> FinishReason:
    """
    Raises:
        VllmError: it ends where nothing ends it.
    """
    if finish == "length":
        if len(tokens) < limit:
            raise VllmError(
                f"the server cut a response off at {len(tokens)} of {limit} tokens: start it with --generation-config vllm and "
                "with --max-model-len of at least model.encoder_seq_length"
            )
        return FinishReason.LENGTH
    if finish == "stop":
        if isinstance(stop, str) and stop in params.stop_strings:
            return FinishReason.STOP_STRING
        if tokens[-1] in params.ends and stop in (None, tokens[-1]):
            return FinishReason.STOP
    raise VllmError(
        f"a response ended at token {tokens[-1]} (finish_reason {finish!r}, stop_reason {stop!r}), which ends none: its ends "
        f"are {sorted(params.ends)} and {list(params.stop_strings)}; start the server with --generation-config vllm"
    )


def in_order(
    requests: Sequence[Request], calls: Sequence[ServerCall], found: Sequence[Sequence[Trajectory]]
) -> list[list[Trajectory]]:
    """Each sample of each request once, from the answers to their calls."""
    result: list[dict[int, Trajectory]] = [{} for _ in requests]
    for call, samples in zip(calls, found, strict=True):
        result[call.number].update(zip(call.samples, samples, strict=True))
    return [[samples[i] for i in range(request.samples)] for request, samples in zip(requests, result, strict=True)]
