"""What the ranks of a layout make of one batch of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.hf import load_hf_weights
from megatron_ext.hf.adapter_files import load_adapter_folder
from megatron_ext.hf.adapter_folder import AdapterFolder
from megatron_ext.models import build_gpt
from megatron_ext.runtime.collectives import gather_objects
from megatron_ext.runtime.engine import Engine
from recipes.data.rows import Pair
from recipes.sft.batches import SFTBatches, SFTMicrobatch, negative_log_likelihood
from recipes.sft.settings import SFTModel
from tests.distributed.lora_scenarios import export_gradients
from tests.distributed.scenarios import copies, optim
from tests.distributed.sharding import load_full, ranks_here

__all__ = ["SFTCase", "exact_sft", "sft_adapters", "sft_gradients"]


@dataclass
class SFTCase:
    """One batch: `shares[rank]` are the pairs of a data-parallel rank."""

    model: SFTModel
    weights: dict[str, Tensor]
    shares: list[list[Pair]]


def sum_over_data(*values: float) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.tolist()


def _own_batches(device: torch.device, model: SFTModel, shares: list[list[Pair]]) -> list[SFTMicrobatch]:
    return SFTBatches(model, device, sum_over_data).of(shares[parallel_state.get_data_parallel_rank()])


def sft_gradients(device: torch.device, case: SFTCase) -> dict[str, Any]:
    """The recipe's metrics and gradients of the batch."""
    model = build_gpt(case.model, device)
    load_full(model, case.weights)
    engine = Engine(model, optim())
    microbatches = _own_batches(device, case.model, case.shares)
    engine.zero_grad()
    metrics = engine.reduce_metrics(engine.run(microbatches, negative_log_likelihood))
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    return {"rank": ranks_here()[0], "metrics": metrics, "gradients": gradients}


def sft_adapters(
    device: torch.device, config: SFTModel, source: Path, adapter: Path, shares: list[list[Pair]], folder: Path
) -> dict[str, list[str]]:
    """Leaves the recipe's gradients of a model with PEFT's adapter in the folder, in PEFT's names; and tells which parameters two
    steps change, and which they do not."""
    model = build_gpt(config, device)
    load_hf_weights(source, model)
    load_adapter_folder(AdapterFolder.open(adapter), model)
    engine, before = Engine(model, optim()), copies(model)
    microbatches = _own_batches(device, config, shares)
    engine.zero_grad()
    engine.run(microbatches, negative_log_likelihood)
    export_gradients(model, folder)
    for _ in range(2):
        engine.update(microbatches, negative_log_likelihood)
    after = copies(model)
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    return {"changed": changed, "kept": [name for name in after if name not in changed]}


def exact_sft(
    device: torch.device, models: list[SFTModel], weights: dict[str, Tensor], pairs: list[Pair]
) -> dict[str, Any]:
    """In fp64, of every model of one layout: (loss, this rank's gradients, tokens that went through the layers on all ranks, and
    those of them that are no padding)."""
    rank, stage = ranks_here()
    model = build_gpt(models[0], device)
    load_full(model, weights)
    model.double()
    model.config.pipeline_dtype = torch.float64
    data, context = parallel_state.get_data_parallel_group(), parallel_state.get_context_parallel_group()
    engine, cases = Engine(model), []
    for config in models:
        batches = SFTBatches(config, device, sum_over_data, (data.rank(), data.size()))
        share = len(pairs) // data.size()
        mine = pairs if batches.by_tokens else pairs[data.rank() * share : (data.rank() + 1) * share]
        microbatches, own = batches.of(mine), batches.own(mine)
        numbers = {id(pair): number for number, pair in enumerate(pairs)}
        everybodys = gather_objects([numbers[id(pair)] for pair in own], data)
        assert sorted(sum(everybodys, [])) == list(range(len(pairs))), "each pair is one rank's"
        assert len(own) == sum(m.batch.groups.num_responses for m in microbatches)
        model.zero_grad(set_to_none=True)
        metrics = engine.reduce_metrics(engine.run(microbatches, negative_log_likelihood))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        for gradient in gradients.values():  # what Megatron's DDP would do, in its fp32
            dist.all_reduce(gradient, group=context)
            dist.all_reduce(gradient, group=data)
        streams = [m.batch.groups for m in microbatches]
        tokens, pad = sum_over_data(sum(s.num_tokens for s in streams), sum(s.num_pad_tokens for s in streams))
        cases.append((metrics["loss"], gradients, tokens, tokens - pad))
    return {"rank": rank, "stage": stage, "cases": cases}
