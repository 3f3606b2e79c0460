"""Faults to plant, one at a time, in a kernel, the merge, the loss and the sampler: each must make the dry run fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ext.attention import kernels, merge_triton
from megatron_ext.rollouts import sampler
from megatron_ext.runtime.engine import Engine
from tests.dry import steps
from tests.dry.run import Fault
from tests.pretend import be_alone

__all__ = ["MUTATIONS", "mutations"]

Plant = Callable[[Callable], Callable]
TORCH, FA2, FA3, BLOCKWISE = (
    kernels.TorchFlashKernel,
    kernels.FlashAttn2Kernel,
    kernels.FlashAttn3Kernel,
    kernels.BlockwiseKernel,
)


def changed(piece, **attributes):
    """A copy of a piece of which something else is said."""
    piece = copy.copy(piece)
    vars(piece).update(attributes)
    return piece


# Each takes what it replaces, and gives what takes its place.
def kernel_reads(forward):
    return lambda self, q, k, v, piece, scoring: forward(self, q * float(q.sum()), k, v, piece, scoring)


def lengths_on_host(forward):
    def planted(self, q, k, v, piece, scoring):
        lengths = torch.zeros(len(piece.cu_seqlens_q), dtype=torch.int32)
        return forward(self, q, k, v, changed(piece, cu_seqlens_q=lengths), scoring)

    return planted


def long_lengths(forward):
    def planted(self, q, k, v, piece, scoring):
        return forward(self, q, k, v, changed(piece, cu_seqlens_k=piece.cu_seqlens_k.long()), scoring)

    return planted


def keys_on_host(forward):
    return lambda self, q, k, v, piece, scoring: forward(
        self, q, torch.zeros(k.shape, dtype=k.dtype), v, piece, scoring
    )


def wide_lse(forward):
    def planted(self, *args):
        out, lse = forward(self, *args)
        return out, lse.double()

    return planted


def wide_query(forward):
    return lambda self, q, k, v, piece, scoring: forward(self, q.float(), k, v, piece, scoring)


def strided_lse(backward):
    """Transposed, and not made contiguous again: the library would read other rows."""

    def planted(self, grad, q, k, v, out, lse, gradients, piece, scoring):
        return backward(self, grad, q, k, v, out, lse.t().contiguous().t(), gradients, piece, scoring)

    return planted


def merge_reads(merge_rows):
    def planted(out, lse, part, part_lse, rows):
        if bool(part_lse.isfinite().all()):
            merge_rows(out, lse, part, part_lse, rows)

    return planted


def rows_on_host(merge_rows):
    return lambda out, lse, part, part_lse, rows: merge_rows(out, lse, part, part_lse, torch.arange(len(part)))


def merged_lse_in_bf16(merge_rows):
    return lambda out, lse, part, part_lse, rows: merge_rows(out, lse, part, part_lse.bfloat16(), rows)


def loss_reads(grpo_loss):
    def planted(logprobs, *args):
        loss, metrics = grpo_loss(logprobs, *args)
        return loss, metrics | {"loss": torch.zeros_like(loss) + loss.item()}

    return planted


def weights_on_host(grpo_loss):
    return lambda logprobs, old, gain, weights, *rest: grpo_loss(logprobs, old, gain, torch.ones(len(weights)), *rest)


def wide_loss(grpo_loss):
    return lambda logprobs, *args: grpo_loss(logprobs.double(), *args)


def masked_loss(grpo_loss):
    """An index of truth values: how many there are must be counted first."""
    return lambda logprobs, *args: (grpo_loss(logprobs, *args)[0] + logprobs[logprobs > 0].sum(), {})


def sampler_reads(choose):
    return lambda logits, *rest: choose(logits / logits.max().item(), *rest)


def bias_on_host(choose):
    return lambda logits, *rest: choose(logits + torch.zeros(logits.size(1)), *rest)


def wide_choice(choose):
    """All logits: `choose_tokens` alone may compute so, and of what its filters leave."""
    return lambda logits, *rest: choose(logits.double(), *rest)


def masked_choice(choose):
    return lambda logits, *rest: choose(logits - logits[logits > 0].sum(), *rest)


def metrics_twice(reduce):
    return lambda self, outputs: [reduce(self, outputs) for _ in range(2)][0]


def no_norm(step):
    """A gradient that nobody has looked at."""
    return lambda self: {"lr": 0.0, "skipped": 0.0}


# name -> (step, where, attribute, what is planted).
MUTATIONS: dict[str, tuple[str, Any, str, Plant]] = {
    "kernel, read": ("grpo, torch_flash", TORCH, "forward", kernel_reads),
    "kernel, tensor of the host": ("grpo, torch_flash", TORCH, "forward", lengths_on_host),
    "kernel, int64 lengths": ("grpo, torch_flash", TORCH, "forward", long_lengths),
    "kernel, fp64 lse": ("grpo, torch_flash", TORCH, "forward", wide_lse),
    "kernel, fp32 query": ("grpo, torch_flash", TORCH, "forward", wide_query),
    "flash-attn 2, tensor of the host": ("grpo, flash_attn_2", FA2, "launch_forward", lengths_on_host),
    "flash-attn 2, int64 lengths": ("grpo, flash_attn_2", FA2, "launch_forward", long_lengths),
    "flash-attn 2, strided lse": ("grpo, flash_attn_2", FA2, "launch_backward", strided_lse),
    "flash-attn 3, keys of the host": ("grpo, flash_attn_3", FA3, "launch_forward", keys_on_host),
    "flash-attn 3, int64 lengths": ("grpo, flash_attn_3", FA3, "launch_forward", long_lengths),
    "flash-attn 3, strided lse": ("grpo, flash_attn_3", FA3, "launch_backward", strided_lse),
    "blockwise, read": ("grpo, blockwise", BLOCKWISE, "forward", kernel_reads),
    "blockwise, keys of the host": ("grpo, blockwise", BLOCKWISE, "forward", keys_on_host),
    "merge, read": ("grpo, torch_flash", merge_triton, "merge_rows", merge_reads),
    "merge, tensor of the host": ("grpo, torch_flash", merge_triton, "merge_rows", rows_on_host),
    "merge, bf16 lse": ("grpo, torch_flash", merge_triton, "merge_rows", merged_lse_in_bf16),
    "loss, read": ("grpo, torch_flash", steps, "grpo_loss", loss_reads),
    "loss, tensor of the host": ("grpo, torch_flash", steps, "grpo_loss", weights_on_host),
    "loss, fp64": ("grpo, torch_flash", steps, "grpo_loss", wide_loss),
    "loss, mask": ("grpo, torch_flash", steps, "grpo_loss", masked_loss),
    "engine, one read more": ("sft", Engine, "reduce_metrics", metrics_twice),
    "engine, one read less": ("sft", Engine, "step", no_norm),
    "sampler, read": ("sample", sampler, "choose_tokens", sampler_reads),
    "sampler, tensor of the host": ("sample", sampler, "choose_tokens", bias_on_host),
    "sampler, fp64": ("sample", sampler, "choose_tokens", wide_choice),
    "sampler, mask": ("sample", sampler, "choose_tokens", masked_choice),
}


def mutations(device: torch.device) -> dict[str, str | None]:
    """What the dry run says of each; None: nothing."""
    found: dict[str, str | None] = {}
    for name, (step, where, attribute, plant) in MUTATIONS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, attribute, plant(getattr(where, attribute)))
            try:
                reads = steps.take(steps.STEPS[step]).reads
                found[name] = None if reads == steps.STEPS[step].reads else f"reads {dict(reads)}"
            except (Fault, AssertionError, RuntimeError) as error:
                found[name] = f"{type(error).__name__}: {error}"
    be_alone()
    return found
