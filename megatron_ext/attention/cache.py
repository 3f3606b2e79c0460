"""Key/value cache for sampling many responses of each prompt: the prompt's keys and values are held once.

Prefill runs all prompts as one packed stream. Decoding runs one row per response; each row sees its prompt's keys
(shared, one rectangle per prompt) and its own response's keys, the two parts merged by log-sum-exp as in training.
Rotated keys are cached, so positions never have to be recomputed.

Shape legend: t prompt tokens in the stream, r responses (decode rows, padding rows at the end), n query and m
key/value heads of this tensor-parallel rank, d head dimension.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.attention.function import planned_attention, prefix_grouped_attention
from megatron_ext.attention.kernels import Scoring, select_kernel
from megatron_ext.attention.merge import merge_partials
from megatron_ext.attention.plan import Call, Plan, Rectangle, Run
from megatron_ext.errors import UserError
from megatron_ext.grouping import PrefixGroups

__all__ = ["DecodeStep", "PrefillStep", "SharedPrefixCache"]


class SharedPrefixCache:
    """Keys and values of every layer of this pipeline stage, for one batch of prompts.

    Args:
        prompts: record of the prompt stream: groups with a prefix and no response.
        samples_per_prompt: responses of every prompt.
        max_new_tokens: room for each response.
    """

    def __init__(self, prompts: PrefixGroups, samples_per_prompt: int, max_new_tokens: int):
        if any(len(tree.lengths) != 1 or not tree.prompt_length for tree in prompts.trees):
            raise UserError(f"the prompt stream must hold non-empty prefixes only, got {prompts}")
        self.prompts = prompts
        self.samples_per_prompt = samples_per_prompt
        self.max_new_tokens = max_new_tokens
        self.num_responses = len(prompts.trees) * samples_per_prompt
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> key, value [t, m, d]
        self.response: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> key, value [r, max_new_tokens, m, d]

    def response_memory(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.response:
            shape = (self.num_responses, self.max_new_tokens, *like.shape[1:])
            self.response[layer] = (like.new_empty(shape), like.new_empty(shape))
        return self.response[layer]


class _Step(PackedSeqParams):
    """A record that is no stream of documents: Megatron must only carry it to the core attention."""

    def __init__(self, cache: SharedPrefixCache):
        super().__init__(qkv_format="sbhd")
        self.cache = cache


class PrefillStep(_Step):
    """Record of the forward pass over the prompts: causal attention, keys and values kept."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, attention_kernel: str = "auto"
    ) -> Tensor:
        """q [t, n, d], k and v [t, m, d] -> [t, n, d]."""
        self.cache.prefix[layer] = (k.contiguous(), v.contiguous())
        return prefix_grouped_attention(q, k, v, self.cache.prompts, scoring, attention_kernel)


class DecodeStep(_Step):
    """Record of one decoding step: row i is the `index`-th token of response i."""

    def __init__(self, cache: SharedPrefixCache, index: int):
        super().__init__(cache)
        self.index = index
        self._calls: dict[int | None, tuple[Call | None, Call]] = {}

    def calls(self, window: int | None) -> tuple[Call | None, Call]:
        """Attention to the prompts, None where the window has left all of them behind, and to the responses so far."""
        if window not in self._calls:
            cache, index = self.cache, self.index
            samples, room = cache.samples_per_prompt, cache.max_new_tokens
            within = index if window is None else min(index, window)  # earlier tokens of the response
            shared = []
            for i, segment in enumerate(cache.prompts.segments):
                seen = segment.length if window is None else min(segment.length, window - within)
                if seen:
                    shared.append(Rectangle(i * samples, samples, segment.start + segment.length - seen, seen))
            own = Run(Rectangle(0, 1, index - within, within + 1), cache.num_responses, q_step=1, k_step=room)
            self._calls[window] = Call.of(shared, causal=False) if shared else None, Call((own,), causal=False)
        return self._calls[window]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, attention_kernel: str = "auto"
    ) -> Tensor:
        """q [r + pad, n, d], k and v [r + pad, m, d] -> [r + pad, n, d]; the pad rows come back zero."""
        cache, rows = self.cache, self.cache.num_responses
        keys, values = cache.response_memory(layer, k)
        keys[:, self.index], values[:, self.index] = k[:rows], v[:rows]
        kernel = select_kernel(attention_kernel, q.device, scoring)
        shared, own = self.calls(scoring.window)
        merged, lse = planned_attention(
            q[:rows], keys.flatten(0, 1), values.flatten(0, 1), Plan((own,)), kernel, scoring
        )
        if shared:
            prompt = planned_attention(q[:rows], *cache.prefix[layer], Plan((shared,)), kernel, scoring)
            merged, _ = merge_partials(merged, lse, *prompt)
        out = torch.zeros_like(q)
        out[:rows] = merged
        return out
