"""What context-parallel ranks compute in the tests of context parallelism alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.attention import Scoring
from megatron_ext.attention.context import ContextShard, context_parallel_attention, gather_rows
from megatron_ext.grouping import PrefixGroups
from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.runtime.collectives import gather_objects
from tests.distributed.sharding import expert_ranks_here, load_full
from tests.gpt_cases import Rollout, objective, pack_rollout, run, small_config

__all__ = ["ContextCase", "FormsCase", "both_forms", "context_attention", "gathered_rows", "latent_traffic"]


@dataclass
class ContextCase:
    """Attention over one stream: nested lengths, and the whole stream's q, k, v and output gradient, fp64."""

    lengths: list
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    comm_type: str
    scoring: Scoring
    attention_kernel: str = "auto"
    perturb: int | None = None  # a stream row whose key and value are changed
    sinks: Tensor | None = None


def context_attention(device: torch.device, cases: list[ContextCase]) -> list[dict[str, Any]]:
    """This rank's part of every case, and how many rows it received through all-gathers."""
    return [_context_case(case) for case in cases]


def latent_traffic(device: torch.device, rollout: Rollout, fields: dict[str, Any]) -> dict[str, Any]:
    """Shapes of what ranks gather, and scatter back, in one forward and backward pass; and rows that all of them share."""
    config = small_config(**fields)
    model = build_gpt(config, device)
    batch = pack_rollout(rollout, pad=stream_multiple(config))
    told: dict[str, list[tuple[int, ...]]] = {"gathered": [], "scattered": []}
    with pytest.MonkeyPatch.context() as patch:
        gather, scatter = torch.distributed.all_gather_into_tensor, torch.distributed.reduce_scatter_tensor

        def gathering(out, mine, **kwargs):
            told["gathered"].append(tuple(out.shape))
            return gather(out, mine, **kwargs)

        def scattering(mine, sent, **kwargs):
            told["scattered"].append(tuple(sent.shape))
            return scatter(mine, sent, **kwargs)

        patch.setattr(torch.distributed, "all_gather_into_tensor", gathering)
        patch.setattr(torch.distributed, "reduce_scatter_tensor", scattering)
        logprobs, _ = run(model, batch)
        logprobs.sum().backward()
    shard = ContextShard.of(
        batch.groups, parallel_state.get_context_parallel_group(), stream_multiple(config), model.pairs_per_token
    )
    return told | {"sent": len(shard.send), "layers": config.num_layers, "predicted": shard.most_entries}


@dataclass
class FormsCase:
    """fields: changes to `small_config`. weights: of the full model. rollouts: each one stream."""

    fields: dict[str, Any]
    weights: dict[str, Tensor]
    rollouts: list[Rollout]


def both_forms(device: torch.device, cases: list[FormsCase]) -> dict[str, Any]:
    """Which experts this rank has; of every case and rollout, in fp64, the log-probabilities of the grouped and of the repeated
    form, and gradients of all ranks together."""
    return {"experts": expert_ranks_here(), "cases": [_forms_of(device, case) for case in cases]}


def _forms_of(device: torch.device, case: FormsCase) -> list[list[tuple[Tensor, dict[str, Tensor]]]]:
    config = small_config(**case.fields)
    model = build_gpt(config, device).double()
    load_full(model, case.weights)
    context, alike = parallel_state.get_context_parallel_group(), parallel_state.get_expert_data_parallel_group()
    found = []
    for rollout in case.rollouts:
        found.append([])
        for share in (True, False):
            batch = pack_rollout(rollout, share, pad=stream_multiple(config))
            logprobs, entropy = run(model, batch)
            objective(rollout, batch.groups, logprobs, entropy).backward()
            gradients = {}
            for name, parameter in model.named_parameters():
                gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(gradients[name], group=alike if "local_experts" in name else context)
            model.zero_grad(set_to_none=True)
            found[-1].append((logprobs.detach(), gradients))
    return found


class _Widest(TorchDispatchMode):
    """Rows of the longest fp32 tensor that is made."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float32 and made.dim():
            self.rows = max(self.rows, len(made))
        return made


def gathered_rows(device: torch.device, lengths: list, width: int) -> dict[str, Any]:
    """The gradient of bf16 rows through `gather_rows`, what it is in fp64, and what was as long as how much on the way."""
    group = parallel_state.get_context_parallel_group()
    shard = ContextShard.of(PrefixGroups.from_lengths(lengths), group, 4, pairs_per_token=3.0)
    count, real = shard.layout.num_gathered, shard.layout.num_rows[group.rank()]
    source = gather_rows(shard.rows[:, None].double(), shard)[:count, 0].long()
    rows = torch.zeros(shard.num_tokens, width, dtype=torch.bfloat16, requires_grad=True)
    out = gather_rows(rows, shard)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(group.rank())).bfloat16()
    with _Widest() as widest:
        out.backward(grad)
    everybodys = sum(gather_objects(grad[:count].double(), group))
    of_stream = torch.zeros(shard.groups.num_tokens, width, dtype=torch.float64).index_add_(0, source, everybodys)
    expected = grad[count:].double()
    expected[:real] += of_stream[shard.rows[:real]]
    sent = group.size() * len(shard.send)
    return {"grad": rows.grad, "expected": expected, "widest": widest.rows, "sent": sent, "all": len(out)}


def _context_case(case: ContextCase) -> dict[str, Any]:
    group = parallel_state.get_context_parallel_group()
    groups = PrefixGroups.from_lengths(case.lengths)
    shard = ContextShard.of(groups, group, 4, pairs_per_token=3.0)
    real = shard.layout.num_rows[group.rank()]
    q, k, v, grad = (x[shard.rows].clone() for x in case.inputs)
    grad[real:] = 0
    if case.perturb is not None:
        changed = (shard.rows == case.perturb) & (torch.arange(len(shard.rows)) < real)
        k[changed] += 1
        v[changed] -= 1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    received = []
    gather = torch.distributed.all_gather_into_tensor

    def counting(out, mine, **kwargs):
        received.append(out.numel())
        return gather(out, mine, **kwargs)

    torch.distributed.all_gather_into_tensor = counting
    try:
        sinks = None if case.sinks is None else case.sinks.clone().requires_grad_()
        out = context_parallel_attention(
            *leaves, shard, case.scoring, case.comm_type, case.attention_kernel, sinks=sinks
        )
    finally:
        torch.distributed.all_gather_into_tensor = gather
    out.backward(grad)
    parts = [x.detach()[:real] for x in (out, *(leaf.grad for leaf in leaves))]
    return {
        "rows": shard.rows[:real],
        "parts": parts,
        "sinks": None if sinks is None else sinks.grad,
        "received": sum(received),
        "gathered": shard.layout.num_gathered,
        "cut": len(shard.layout.cut),
    }
