"""What the ranks of a layout make of every objective, in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.grouping import pack
from megatron_ext.losses import OBJECTIVES, GrpoTerms, token_weights
from megatron_ext.losses.off_policy import OffPolicyTerms
from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.runtime.engine import Engine
from recipes.grpo.batches import GRPOMicrobatch
from recipes.grpo.objective import objective
from tests.distributed.sharding import load_full, ranks_here
from tests.engine_cases import CONSTANT, counts
from tests.gpt_cases import Rollout, small_config

__all__ = ["IMPORTANCE", "TEMPERATURE", "ObjectiveCase", "objectives"]

TEMPERATURE = 0.9
IMPORTANCE = {
    "none": None,
    "token": OffPolicyTerms("token", "mask", 0.8, 1.25),
    "sequence": OffPolicyTerms("sequence", "truncate", high=1.5),
}


@dataclass(frozen=True)
class ObjectiveCase:
    """
    Attributes:
        terms: of `GrpoTerms`, beside the objective.
        packing: groups, trees or repeated.
        asked: whether old log-probabilities are those of a pass before; else the update's own.
        cuts: groups of each microbatch.
    """

    objective: str
    options: dict[str, Any]
    terms: dict[str, Any]
    importance: str
    packing: str
    asked: bool
    cuts: list[list[int]]


def objectives(
    device: torch.device,
    fields: dict,
    weights: dict[str, Tensor],
    rollout: Rollout,
    sampled: list[Tensor],
    cases: list[ObjectiveCase],
) -> dict[str, Any]:
    """(loss, this rank's gradients) of every case."""
    rank, stage = ranks_here()
    model = build_gpt(small_config(**fields), device)
    load_full(model, weights)
    model.double()
    model.config.pipeline_dtype = torch.float64
    return {"rank": rank, "stage": stage, "cases": [_case(model, case, rollout, sampled) for case in cases]}


def _case(model, case: ObjectiveCase, rollout: Rollout, sampled: list[Tensor]) -> tuple[float, dict[str, Tensor]]:
    engine = Engine(model)
    made = OBJECTIVES[case.objective](**case.options)
    terms = GrpoTerms(made, **case.terms)
    loss = partial(objective, terms=terms, off_policy=IMPORTANCE[case.importance])
    microbatches = [_microbatch(model, case, rollout, sampled, numbers, made.normalisation) for numbers in case.cuts]
    model.zero_grad(set_to_none=True)
    metrics = engine.reduce_metrics(engine.run(microbatches, loss))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for gradient in gradients.values():  # what Megatron's DDP would do, in its fp32
        dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
    return metrics["loss"], gradients


def _microbatch(model, case, rollout, sampled, numbers, normalisation) -> GRPOMicrobatch:
    part, told = rollout.pick(numbers), _picked(rollout, sampled, numbers)
    beginnings = rollout.min_shared if case.packing == "trees" else None
    shared = {"share_prefix": case.packing != "repeated", "min_shared": beginnings}
    batch = pack(part.prompts, part.responses, stream_multiple(model.model_config), **shared)
    ids, count, totals = batch.groups.response_ids, batch.groups.num_responses, counts(rollout)
    mask = batch.loss_mask(part.masks)
    weights = token_weights(ids, mask, count, totals["tokens"], totals["responses"], normalisation, CONSTANT)
    return GRPOMicrobatch(
        batch,
        TEMPERATURE,
        advantages=torch.tensor(part.advantages, dtype=torch.float64)[ids],
        weights=weights,
        sampled_logprobs=torch.cat(told),
        old_logprobs=torch.cat(part.old) if case.asked else None,
        ref_logprobs=torch.cat(part.reference),
    )


def _picked(rollout: Rollout, values: list[Tensor], numbers: list[int]) -> list[Tensor]:
    """Of the responses of these groups."""
    first = [0]
    for responses in rollout.responses:
        first.append(first[-1] + len(responses))
    return [values[i] for g in numbers for i in range(first[g], first[g + 1])]
