"""A few steps with everything that a run does between them, with and without gathers of weights that overlap with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_ext.adapters import adapter_parameters
from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.rollouts import SamplingParams
from megatron_ext.runtime import optim as settings
from megatron_ext.runtime.checkpoint import load_adapters, load_weights, save_checkpoint
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.optim import OptimConfig
from megatron_ext.runtime.reference import ReferenceWeights
from tests.distributed.scenarios import copies
from tests.gpt_cases import randomize, small_config
from tests.sampling import generate

__all__ = ["GatherCase", "gathers"]

BUCKET = 700  # numbers: several of the small model
STEPS = 3


@dataclass
class GatherCase:
    """fields: changes to `small_config`. prompts: of each data-parallel rank, perhaps with media; their responses.

    frozen: layers that do not train.
    """

    fields: dict[str, Any]
    prompts: list[list]
    responses: list[list[list[int]]]
    folder: Path
    frozen: tuple[int, ...] = ()


def gathers(device: torch.device, cases: list[GatherCase]) -> list[dict[bool, dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            settings, "DistributedDataParallelConfig", partial(DistributedDataParallelConfig, bucket_size=BUCKET)
        )
        return [{overlap: _run(device, case, overlap) for overlap in (False, True)} for case in cases]


def _run(device: torch.device, case: GatherCase, overlap: bool) -> dict[str, Any]:
    config = small_config(**case.fields)
    model = build_gpt(config, device)
    randomize(model, torch.Generator().manual_seed(7 + parallel_state.get_pipeline_model_parallel_rank()))
    with torch.no_grad():  # of two stages with one matrix each has the same
        for name, weight in model.named_parameters():
            if "word_embeddings" in name or "output_layer" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    for layer in getattr(model, "decoder", model).layers if case.frozen else ():
        layer.requires_grad_(layer.layer_number - 1 not in case.frozen)
    optim = OptimConfig(lr=1e-2, eps=1e-3, overlap_grad_reduce=True)
    engine = Engine(model, replace(optim, overlap_param_gather=overlap))
    initial = None if case.frozen or config.peft else ReferenceWeights(engine, on_host=True)
    rank = parallel_state.get_data_parallel_rank()
    batch = pack_prompts(
        case.prompts[rank], case.responses, config.position_embedding.scheme, stream_multiple(config), device
    )
    streams = [Microbatch(batch)] * 2

    def loss(microbatch, logprobs, entropy):
        return -logprobs.sum() / 40, {"loss": logprobs.detach().sum()}

    found: dict[str, Any] = {"losses": [], "scores": [], "sampled": [], "weights": [], "pending": [], "left": []}
    for step in range(STEPS):
        found["losses"].append(engine.update(streams, loss))
        found["pending"].append(_pending(engine))
        if step % 2 == 0:
            sampling = SamplingParams(4, temperature=1.1)
            if step == 0:  # sampling is the first to ask for weights, then scoring
                found["sampled"].append(generate(model, case.prompts[rank], 2, sampling, 5 + step))
                found["left"].append(_pending(engine))
            if initial is not None:
                with initial.used():
                    found["scores"] += engine.score(streams[:1])
            found["scores"] += engine.score(streams[:1])
            found["left"].append(_pending(engine))
            engine.gather_weights()
            found["weights"].append(copies(model))
    found["losses"].append(engine.update(streams, loss))
    engine.gather_weights()  # nobody else has asked for any since this step
    place = case.folder / f"{overlap}"
    save_checkpoint(place, model, {}, engine.optimizer)
    again = build_gpt(config, device)
    if config.peft is None:
        load_weights(place, again)
        found["saved"] = copies(again)
    else:
        load_adapters(place, again)
        found["saved"] = {name: p.detach().clone() for name, p in adapter_parameters(again).items()}
    found["weights"].append(copies(model))
    found["groups"] = len(_groups(engine))
    return found


def _pending(engine: Engine) -> int:
    """Gathers that are under way."""
    return sum(group.param_gather_handle is not None for group in _groups(engine))


def _groups(engine: Engine) -> list:
    return [group for piece in engine.pieces for group in (*piece.bucket_groups, *piece.expert_parallel_bucket_groups)]
