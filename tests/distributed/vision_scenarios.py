"""What every rank does in the tests of vision towers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.rollouts import SamplingParams
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.optim import OptimConfig
from tests.distributed.sharding import load_full, ranks_here
from tests.edges import Edges
from tests.gpt_cases import randomize, small_config
from tests.sampling import generate

__all__ = ["SeeingCase", "see"]


@dataclass
class SeeingCase:
    """A model with a tower, prompts with pictures, their responses, and a factor for every response token [r].

    weights: of the full model, or the seed to make them from (one rank only). optim: of the step that is taken at the end.
    """

    fields: dict[str, Any]
    weights: dict[str, Tensor] | int
    prompts: list
    responses: list[list[list[int]]]
    factors: Tensor
    optim: OptimConfig


def see(device: torch.device, cases: list[SeeingCase]) -> dict[str, Any]:
    rank, stage = ranks_here()
    return {"rank": rank, "stage": stage, "cases": [_see_case(device, case) for case in cases]}


def _see_case(device: torch.device, case: SeeingCase) -> dict[str, Any]:
    """Two passes with gradients, one without, sampled tokens, and a step; and how often the tower was run."""
    config = small_config(**case.fields)
    model = build_gpt(config, device)
    if isinstance(case.weights, int):
        randomize(model, torch.Generator().manual_seed(case.weights))
    else:
        load_full(model, case.weights)
    result: dict[str, Any] = {"weights": {name: p.detach().clone() for name, p in model.named_parameters()}}
    engine = Engine(model, case.optim, clip_grad=0.0)
    batch = pack_prompts(
        case.prompts, case.responses, config.position_embedding.scheme, stream_multiple(config), device
    )
    text = pack_prompts([[1, 2, 3]], [[[4, 5]]], config.position_embedding.scheme, stream_multiple(config), device)
    engine.zero_grad()

    def loss(microbatch, logprobs, entropy):
        factors = case.factors if len(logprobs) == len(case.factors) else torch.ones(len(logprobs))
        return (logprobs * factors).sum(), {}

    engine.run([Microbatch(batch), Microbatch(text)], loss)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result["gradients"] = {name: p.main_grad.clone() for name, p in trained.items()}
    (result["scores"],) = engine.score([Microbatch(batch)])
    with Edges("argmax") as edges:
        result["greedy"] = generate(model, case.prompts, 2, SamplingParams(3, use_greedy=True))
    result["clear"] = edges.clear
    engine.step()
    result["stepped"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    tower = getattr(model, "vision_tower", None)
    result["seen"] = None if tower is None else tower.seen
    return result
