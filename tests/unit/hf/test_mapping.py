"""What a tensor-parallel rank holds of the query, key and value tensors, with more and with fewer key/value heads than ranks."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.hf.mapping import OURS, entries
from tests.gpt_cases import small_config
from tests.layouts import randn

QKV = OURS + "self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("heads", "groups", "kv_channels", "tp"),
    [(8, 4, 6, 2), (12, 2, 4, 4), (8, 2, 2, 8), (8, 1, 2, 4), (16, 1, 6, 4)],
    ids=["whole groups", "parts of groups", "one query head each", "borders within heads", "borders within queries"],
)
def test_ranks_hold_equal_stretches_of_one_group_after_the_other(heads, groups, kv_channels, tp, rng):
    config = small_config(
        num_attention_heads=heads, num_query_groups=groups, kv_channels=kv_channels, tensor_model_parallel_size=tp
    )
    names = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]
    rows = [heads * kv_channels, groups * kv_channels, groups * kv_channels]
    tensors = {name: randn(rng, r, config.hidden_size) for name, r in zip(names, rows, strict=True)}
    in_groups = [t.view(groups, -1, config.hidden_size) for t in tensors.values()]
    expected = torch.cat([t[group] for group in range(groups) for t in in_groups]).chunk(tp)
    for rank in range(tp):
        found = torch.full_like(expected[rank], torch.nan)
        for hf_slice in entries(config)[QKV].slices(1, config, rank):
            target = found.view(hf_slice.view)[hf_slice.place]
            target.copy_(tensors[hf_slice.name][hf_slice.index].view_as(target))
            assert entries(config)[QKV].parameter_shape(hf_slice) == found.shape
        assert torch.equal(found, expected[rank])
