"""What the ranks of a layout compute of a model that sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.rollouts import SamplingParams
from megatron_ext.runtime.checkpoint import load_weights, save_checkpoint
from megatron_ext.runtime.engine import Engine, Microbatch
from tests.distributed.layout_scenarios import NEW_TOKENS
from tests.distributed.scenarios import CLIP, copies, optim
from tests.distributed.sharding import load_full, ranks_here
from tests.edges import Edges
from tests.gpt_cases import randomize, small_config
from tests.sampling import generate

__all__ = ["MediaCase", "media"]


@dataclass
class MediaCase:
    """A model that sees, prompts with media, their responses, and a factor for every response token [r].

    weights: of the full model, or the seed to make them from (one rank only). save, load: a checkpoint of them.
    """

    fields: dict[str, Any]
    weights: dict[str, Tensor] | int
    prompts: list
    responses: list[list[list[int]]]
    factors: Tensor
    folder: Path
    load: bool = False


def media(device: torch.device, cases: list[MediaCase]) -> dict[str, Any]:
    rank, stage = ranks_here()
    return {"rank": rank, "stage": stage, "cases": [_media_case(device, case) for case in cases]}


def _media_case(device: torch.device, case: MediaCase) -> dict[str, Any]:
    config = small_config(**case.fields)
    model = build_gpt(config, device)
    result: dict[str, Any] = {}
    if case.load:
        load_weights(case.folder, model)
        result["loaded"] = copies(model)
    if isinstance(case.weights, int):
        randomize(model, torch.Generator().manual_seed(case.weights))
        save_checkpoint(case.folder, model, {})
    else:
        load_full(model, case.weights)
    result["weights"] = copies(model)
    engine = Engine(model, optim(), clip_grad=CLIP)
    scheme = config.position_embedding.scheme
    batch = pack_prompts(case.prompts, case.responses, scheme, stream_multiple(config), device)
    engine.zero_grad()
    microbatches = [Microbatch(batch), Microbatch(batch)]
    engine.run(microbatches, lambda microbatch, logprobs, entropy: ((logprobs * case.factors).sum(), {}))
    result["gradients"] = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    (result["scores"],) = engine.score(microbatches[:1])
    sampling = SamplingParams(NEW_TOKENS, use_greedy=True)
    with Edges("argmax") as edges:
        result["greedy"] = generate(model, case.prompts, 2, sampling)
    return result | {"clear": edges.clear}
