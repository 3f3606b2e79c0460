"""What a GPU rank computes. Every function also runs on the CPU, where its logic can be tried."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.attention import PrefixGroupedCoreAttention, prefix_grouped_attention
from megatron_ext.grouping import PrefixGroups
from megatron_ext.models.config import GPTModelConfig
from tests.layouts import Lengths, plain_attention

__all__ = ["AttentionCase", "attention", "layer_without_sync"]


@dataclass
class AttentionCase:
    """Inputs of one attention call: q, k, v and the gradient of the rows before the pad."""

    lengths: Lengths
    pad: int
    inputs: list[Tensor]
    grad: Tensor


def attention(device: torch.device, cases: list[AttentionCase]) -> list[dict[str, list[Tensor]]]:
    """[out, dq, dk, dv] of the device's own kernel and of plain attention, both in the inputs' precision."""
    results = []
    for case in cases:
        groups = PrefixGroups.from_lengths(case.lengths, case.pad, device)
        results.append(
            {
                "grouped": _run(device, case, lambda q, k, v, g=groups: prefix_grouped_attention(q, k, v, g)),
                "plain": _run(device, case, lambda q, k, v, n=case.lengths: plain_attention(q, k, v, n)),
            }
        )
    return results


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
    config = GPTModelConfig(
        num_layers=1,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_query_groups=k.size(2),
        ffn_hidden_size=64,
        precision="bf16",
    ).transformer_config()
    layer = PrefixGroupedCoreAttention(config, 1, AttnMaskType.causal, "self")
    groups = PrefixGroups.from_lengths(case.lengths, case.pad, device)
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
