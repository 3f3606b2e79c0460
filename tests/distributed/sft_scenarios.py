"""What the ranks of a layout make of one batch of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.models import build_gpt
from megatron_ext.runtime.engine import Engine
from recipes.data.rows import Pair
from recipes.sft.batches import make_microbatches, negative_log_likelihood
from recipes.sft.settings import SFTModel
from tests.distributed.scenarios import optim
from tests.distributed.sharding import load_full, ranks_here

__all__ = ["SFTCase", "sft_gradients"]


@dataclass
class SFTCase:
    """One batch: `shares[rank]` are the pairs of a data-parallel rank."""

    model: SFTModel
    weights: dict[str, Tensor]
    shares: list[list[Pair]]


def sft_gradients(device: torch.device, case: SFTCase) -> dict[str, Any]:
    """The recipe's metrics and gradients of the batch."""
    model = build_gpt(case.model, device)
    load_full(model, case.weights)
    engine = Engine(model, optim())
    data = parallel_state.get_data_parallel_group()

    def sum_over_data(*values: float) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=data)
        return total.tolist()

    microbatches = make_microbatches(case.shares[data.rank()], case.model, device, sum_over_data)
    engine.zero_grad()
    metrics = engine.reduce_metrics(engine.run(microbatches, negative_log_likelihood))
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    return {"rank": ranks_here()[0], "metrics": metrics, "gradients": gradients}
