"""What backward of attention really holds at once, on any rank of a context-parallel group."""

from __future__ import annotations

import weakref

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.attention.context import ContextShard, context_parallel_attention
from megatron_ext.attention.function import prefix_grouped_attention
from megatron_ext.attention.kernels import Scoring
from megatron_ext.flops import ModelShape
from megatron_ext.grouping import pack
from megatron_ext.models.config import stream_multiple
from tests.distributed.planner_scenarios import ActivationCase, here, random_tokens

__all__ = ["attention_peaks"]


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations make and that are still there; `peak`: the most of them at once."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.bytes -= size


def attention_peaks(device: torch.device, cases: list[ActivationCase]) -> list[int]:
    """Bytes at the peak of the backward pass of one layer's attention, the output's gradient included, without what was
    saved for it."""
    return [_attention_peak(device, case) for case in cases]


def _attention_peak(device: torch.device, case: ActivationCase) -> int:
    config = here(case.fields)
    prompts, responses = random_tokens(case.lengths)
    record = pack(prompts, responses, stream_multiple(config), device=device, share_prefix=case.share_prefix).groups
    scoring = Scoring(config.kv_channels**-0.5)
    if config.context_parallel_size > 1:
        group, cost = parallel_state.get_context_parallel_group(), ModelShape.of(config).pairs_per_token
        record = ContextShard.of(record, group, stream_multiple(config), cost)
    heads = (config.num_attention_heads, config.num_query_groups, config.num_query_groups)
    sizes = [(record.num_tokens, n, config.kv_channels) for n in heads]
    query, key, value = (torch.randn(size, dtype=config.dtype, requires_grad=True) for size in sizes)
    if config.context_parallel_size > 1:
        out = context_parallel_attention(query, key, value, record, scoring, config.cp_comm_type)
    else:
        out = prefix_grouped_attention(query, key, value, record, scoring, attention_plan="levels")
    grad = torch.randn_like(out)
    with Alive() as alive:
        out.backward(grad)
    return alive.peak + grad.nbytes
