"""Whether a server can serve this run: its version, routes and tokenizer, and by the canary its weights."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from megatron_ext.errors import DivergedError
from megatron_ext.grouping.routes import RouteShape
from megatron_ext.rollouts.vllm.canary import TEMPERATURE, Canary
from megatron_ext.rollouts.vllm.client import Connection
from megatron_ext.rollouts.vllm.protocol import NO_ROUTES, GivenUpError, VllmError
from megatron_ext.rollouts.vllm.spans import FIRST, ROUTE, probe_body, read_label

__all__ = ["OLDEST_VLLM", "Probe", "WrongWeightsError", "check_canary", "introduce"]

OLDEST_VLLM = (0, 32)  # older ones have not been tried, and have no tags on their weights


class WrongWeightsError(DivergedError):
    """A server's weights are not those that are trained."""


@dataclass(frozen=True)
class Probe:
    """What a server must agree about.

    Attributes:
        text, ids: the tokenizer's, without special tokens.
        max_length: tokens of prompt and response.
        tolerance: of the canary, in nats.
        spans: whether it must tell for each token which weights sampled it.
        routes: of the experts that it must tell for each token; None: nobody asks.
    """

    text: str
    ids: tuple[int, ...]
    max_length: int
    tolerance: float
    spans: bool = False
    routes: RouteShape | None = None


async def introduce(server: Connection, probe: Probe) -> str:
    """What the server calls its model.

    Raises:
        VllmError: it cannot serve this run.
        GivenUpError: it does not answer yet.
    """
    if not await server.is_healthy():
        raise GivenUpError(f"{server.url} does not answer")
    version = str((await server.get("/version"))["version"])
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_VLLM:
        raise VllmError(f"{server.url} is vLLM {version}: {'.'.join(map(str, OLDEST_VLLM))} or newer is needed")
    label = (await server.get("/weight_info"))["weight_version"]  # of the routes that replace weights
    card = (await server.get("/v1/models"))["data"][0]
    if card["max_model_len"] < probe.max_length:
        raise VllmError(
            f"{server.url} takes {card['max_model_len']} tokens, model.encoder_seq_length={probe.max_length}: start it "
            f"with --max-model-len {probe.max_length}"
        )
    asked = {"model": card["id"], "prompt": probe.text, "add_special_tokens": False}
    found = (await server.post("/tokenize", asked))["tokens"]
    if tuple(found) != probe.ids:
        raise VllmError(
            f"{server.url} has another tokenizer than this run: {probe.text!r} is {found} there and "
            f"{list(probe.ids)} here; start it with this run's model"
        )
    if probe.spans:
        told = read_label(await server.post(ROUTE, probe_body(card["id"])))
        if told != label:
            raise VllmError(f"{server.url} says that weights {told!r} have sampled, and that it has weights {label!r}")
    if probe.routes is not None:
        asked = {"model": card["id"], "prompt": list(probe.ids), "max_tokens": 1, "ignore_eos": True}
        (choice,) = (await server.post("/v1/completions", asked | _priority(probe)))["choices"]
        if choice.get("routed_experts") is None:
            raise VllmError(f"{server.url}: {NO_ROUTES}")
    return card["id"]


def _priority(probe: Probe) -> dict[str, int]:
    """Before all that is sampled, where servers know priorities."""
    return {"priority": FIRST} if probe.spans else {}


async def check_canary(server: Connection, name: str, canary: Canary, probe: Probe) -> None:
    """
    Args:
        name: what the server calls its model.

    Raises:
        WrongWeightsError: the server's weights are others.
        VllmError: it gives log-probabilities of another kind.
    """
    tolerance, first = probe.tolerance, _priority(probe)
    bodies = canary.prompt_body(name) | first, canary.sample_body(name) | first
    of_text, sampled = await asyncio.gather(*(server.post("/v1/completions", body) for body in bodies))
    of_text = canary.text_difference(of_text)
    if of_text > tolerance:
        raise WrongWeightsError(
            f"{server.url} has not the trainer's weights: its log-probabilities of the canary differ from the trainer's by "
            f"{of_text:.3g} nats on average, at most {tolerance:g} was expected (trainer.grpo.rollout.tolerance)"
        )
    scaled, unscaled = canary.sample_differences(sampled)
    if scaled > tolerance >= unscaled:
        raise VllmError(
            f"{server.url} gives log-probabilities from before the temperature: start it with --logprobs-mode "
            "processed_logprobs"
        )
    if scaled > tolerance:
        raise WrongWeightsError(
            f"{server.url} samples the canary's next token at temperature {TEMPERATURE:g} with log-probabilities that "
            f"differ from the trainer's by {scaled:.3g} nats on average, at most {tolerance:g} was expected; the text "
            f"before it differs by {of_text:.3g}: is something cached from older weights, or does the server add "
            "penalties or filters of its own (--generation-config vllm)?"
        )
