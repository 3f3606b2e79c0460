"""What a GPU rank computes. Every function also runs on the CPU, where its logic can be tried."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ext.attention import PrefixGroupedCoreAttention, Scoring, prefix_grouped_attention
from megatron_ext.attention.cache import DecodeStep
from megatron_ext.attention.merge import merge_partials
from megatron_ext.grouping import PrefixGroups
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.megatron_config import megatron_config
from tests.layouts import plain_tree_attention
from tests.paged_cases import PagedCase, write

__all__ = ["AttentionCase", "MergeCase", "attention", "layer_without_sync", "merge", "paged"]


@dataclass
class AttentionCase:
    """Inputs of one attention call: nested lengths, q, k, v and perhaps sinks, and the gradient of the rows before the pad."""

    forest: list
    pad: int
    inputs: list[Tensor]
    grad: Tensor
    scoring: Scoring
    how: dict[str, str] = field(default_factory=dict)  # attention_kernel, attention_plan

    @property
    def rules(self) -> dict[str, float | int | None]:
        """Of plain attention."""
        return {"softcap": self.scoring.softcap, "window": self.scoring.window, "scale": self.scoring.scale}


def attention(device: torch.device, cases: list[AttentionCase]) -> list[dict[str, list[Tensor]]]:
    """[out, dq, dk, dv], and the gradient of sinks where there are some, of prefix-grouped and of plain attention, both in the
    inputs' precision."""
    results = []
    for case in cases:
        groups = PrefixGroups.from_lengths(case.forest, case.pad, device)

        def grouped(q, k, v, sinks=None, case=case, groups=groups):
            return prefix_grouped_attention(q, k, v, groups, case.scoring, **case.how, sinks=sinks)

        def plain(q, k, v, sinks=None, case=case):
            return plain_tree_attention(q, k, v, case.forest, **case.rules, sinks=sinks)

        results.append({"grouped": _run(device, case, grouped), "plain": _run(device, case, plain)})
    return results


def paged(device: torch.device, case: PagedCase, scoring: Scoring, kernel: str, sinks: Tensor | None = None) -> Tensor:
    """What every row of a decoding step sees, on the host."""
    there = write(case, device, heads_first=device.type == "cpu")
    step = DecodeStep(there.pool, there.rows)
    sinks = None if sinks is None else sinks.to(device)
    return step.attend(1, case.query.to(device), there.key, there.value, scoring, kernel, sinks).cpu()


def _run(device: torch.device, case: AttentionCase, attend) -> list[Tensor]:
    leaves = [x.detach().clone().to(device).requires_grad_() for x in case.inputs]
    out = attend(*leaves)[: case.grad.size(0)]
    out.backward(case.grad.to(device))
    return [x.cpu() for x in (out.detach(), *(leaf.grad for leaf in leaves))]


def layer_without_sync(device: torch.device, case: AttentionCase) -> list[bool]:
    """Core attention forward and backward with every wait of the host made an error; whether it repeats bitwise.

    The first pass over a layout makes its index tables; the layers after it must not wait.
    """
    from megatron.core.transformer.enums import AttnMaskType

    q, k, v = (x.detach().clone().to(device).unsqueeze(1).requires_grad_() for x in case.inputs)
    heads, head_dim = q.size(2), q.size(3)
    window = case.scoring.window
    config = GPTModelConfig(
        num_layers=1,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_query_groups=k.size(2),
        ffn_hidden_size=64,
        precision="bf16",
        window_size=None if window is None else [window, 0],
    )
    layer = PrefixGroupedCoreAttention(megatron_config(config, device.type), 1, AttnMaskType.causal, "self", **case.how)
    groups = PrefixGroups.from_lengths(case.forest, case.pad, device)
    grad = torch.ones(q.size(0), 1, heads * head_dim, dtype=q.dtype, device=device)

    def step() -> list[Tensor]:
        out = layer(q, k, v, packed_seq_params=groups)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

    first = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    # The backward of flash attention adds up in no fixed order: only the output repeats bitwise.
    return [torch.equal(first[0], second[0]), *(bool(x.isfinite().all()) for x in second)]


@dataclass
class MergeCase:
    """out [t, n, d], lse [t, n] and a part of r rows at `rows`."""

    out: Tensor
    lse: Tensor
    part: Tensor
    part_lse: Tensor
    rows: Tensor | slice


def merge(device: torch.device, cases: list[MergeCase]) -> list[dict[str, Tensor]]:
    """The Triton kernel, compiled, beside the torch operations."""
    from megatron_ext.attention.merge_triton import merge_rows

    results = []
    for case in cases:
        out, lse, part, part_lse = (x.to(device).clone() for x in (case.out, case.lse, case.part, case.part_lse))
        rows = case.rows if isinstance(case.rows, slice) else case.rows.to(device)
        merged, merged_lse = merge_partials(out[rows], lse[rows], part, part_lse)
        merge_rows(out, lse, part, part_lse, rows)
        results.append(
            {"out": out[rows].cpu(), "lse": lse[rows].cpu(), "torch out": merged.cpu(), "torch lse": merged_lse.cpu()}
        )
    return results
