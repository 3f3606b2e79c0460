"""What a rank samples, in fp64, with room for everything and with hardly any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.models import build_gpt
from megatron_ext.rollouts import MegatronSource, Request
from tests.distributed.scenarios import copies
from tests.distributed.sharding import load_full
from tests.gpt_cases import randomize, small_config
from tests.sampling import Reckoning

__all__ = ["RolloutCase", "rollouts"]


@dataclass
class RolloutCase:
    """
    Attributes:
        fields: changes to `small_config`.
        weights: of the full model, or the seed to make them from.
        budgets: of `rollout_tokens`, one after the other.
    """

    fields: dict[str, Any]
    weights: dict[str, Tensor] | int
    requests: list[Request]
    budgets: list[int | None]


def rollouts(device: torch.device, case: RolloutCase) -> dict[str, Any]:
    """Tokens and log-probabilities by budget, how often responses stepped back, how many each lane sampled, how often this rank
    has asked an environment, and of which requests a response was answered."""
    model = build_gpt(small_config(**case.fields), device)
    if isinstance(case.weights, int):
        randomize(model, torch.Generator().manual_seed(case.weights))
    else:
        load_full(model, case.weights)
    weights = copies(model)
    model.double()
    model.config.pipeline_dtype = torch.float64
    found, back, lanes = [], [], []
    for budget in case.budgets:
        source = MegatronSource(model, rollout_tokens=budget)
        answers = source.sample(case.requests)
        found.append([[(t.tokens, t.logprobs) for t in group] for group in answers])
        back.append(sum(lane.stepped_back for lane in source.lanes))
        lanes.append([lane.pool.peak for lane in source.lanes])
    answered = [any(not all(t.mask) for t in group) for group in answers]
    return {
        "weights": weights, "found": found, "stepped back": back, "lanes": lanes, "asked": Reckoning.asked,
        "answered": answered,
    }  # fmt: skip
