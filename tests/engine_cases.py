"""Microbatches with GRPO's inputs for the engine, normalised over the whole batch however it is cut."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses import GrpoTerms, token_weights
from megatron_ext.losses.gpg import Gpg
from megatron_ext.models import PrefixGroupedGPT, build_gpt
from megatron_ext.rollouts import MegatronSource, Request, SamplingParams
from megatron_ext.runtime.engine import Engine
from recipes.grpo.batches import GRPOMicrobatch
from recipes.grpo.objective import objective
from tests.edges import Edges
from tests.gpt_cases import TERMS, Rollout, make_rollout, pack_rollout, run, small_config
from tests.gpt_cases import objective as plain_objective

__all__ = [
    "CONSTANT", "counts", "edges_of", "gradient_floor", "grpo", "make_microbatches", "relative_error", "smooth",
    "too_long_a_stream",
]  # fmt: skip

CONSTANT = 100.0  # what tokens are divided by where normalisation is constant
TEMPERATURE = 0.9
SMOOTH = GrpoTerms(Gpg(), kl_penalty=TERMS.kl_penalty, entropy_bonus=TERMS.entropy_bonus)


def counts(rollout: Rollout) -> dict[str, float]:
    """Predicted tokens that count, and responses that have one."""
    kept = [sum(mask[0 if prompt else 1 :]) for (prompt, _), mask in zip(rollout.flat, rollout.masks, strict=True)]
    return {"tokens": sum(kept), "responses": sum(k > 0 for k in kept)}


def make_microbatches(
    rollout: Rollout, cuts: list[list[int]], totals: dict[str, float], level: str = "token", pad: int = 16
) -> list[GRPOMicrobatch]:
    """One microbatch for each list of group numbers; `totals` are the counts of the global batch."""
    microbatches = []
    for numbers in cuts:
        part = rollout.pick(numbers)
        batch = pack_rollout(part, pad=pad)
        groups = batch.groups
        weights = token_weights(
            groups.response_ids,
            batch.loss_mask(part.masks),
            groups.num_responses,
            totals["tokens"],
            totals["responses"],
            level,
            CONSTANT,
        )
        microbatches.append(
            GRPOMicrobatch(
                batch,
                temperature=TEMPERATURE,
                advantages=torch.tensor(part.advantages)[groups.response_ids],
                weights=weights,
                old_logprobs=torch.cat(part.old).float(),
                ref_logprobs=torch.cat(part.reference).float(),
            )
        )
    return microbatches


def edges_of(model: PrefixGroupedGPT, rollout: Rollout) -> Edges:
    """Of a whole model's pass over the rollout, and of its GRPO loss."""
    batch = pack_rollout(rollout)
    model.eval()  # experts' tokens are not counted
    with Edges() as edges:
        plain_objective(rollout, batch.groups, *run(model, batch, TEMPERATURE))
    model.train()
    return edges


def grpo(microbatch: GRPOMicrobatch, logprobs: Tensor, entropy: Tensor):
    """The engine's loss function, as the recipe has it."""
    return objective(microbatch, logprobs, entropy, TERMS)


def smooth(microbatch: GRPOMicrobatch, logprobs: Tensor, entropy: Tensor):
    """One that clips nothing: of weights that differ by a last bit its gradients do, too, wherever ratios lie."""
    return objective(microbatch, logprobs, entropy, SMOOTH)


def relative_error(value: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference, relative to the largest true value, or to `floor` where that is larger."""
    assert value.shape == truth.shape, f"{tuple(value.shape)} and {tuple(truth.shape)}"
    largest = max(truth.double().abs().max().item(), floor)
    return (value.double() - truth.double()).abs().max().item() / largest


def gradient_floor(gradients: dict[str, Tensor]) -> float:
    """A tenth of the largest entry of a model's gradient.

    Some weights' gradients (of the q and k norms) are small differences of large sums, and their rounding is that of
    the sums: measured against their own size it says nothing. A wrong term of one part in a hundred still shows.
    """
    return 0.1 * max(g.abs().max().item() for g in gradients.values())


def too_long_a_stream(device: torch.device) -> tuple[str, str]:
    """What is said where a stream, and then a prompt to be sampled behind, needs more memory than this rank may have."""
    model = build_gpt(small_config(encoder_seq_length=1 << 16), device)
    engine, rollout = Engine(model), make_rollout(torch.Generator().manual_seed(1), [(3, [40960])], 61)
    microbatches = make_microbatches(rollout, [[0]], {"tokens": 40960, "responses": 1})
    requests = Request.each([rollout.responses[0][0]], 2, SamplingParams(4))
    return full(lambda: engine.run(microbatches, grpo)), full(lambda: MegatronSource(model).sample(requests))


def full(work: Callable[[], object]) -> str:
    """What is said where it needs more than 24 MB of address space beside what this process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), resource.RLIM_INFINITY))
    try:
        work()
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "it has run"
