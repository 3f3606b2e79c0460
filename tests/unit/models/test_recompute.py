"""Activation recomputation gives bitwise the gradients of keeping the activations."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.models import build_gpt
from tests.gpt_cases import make_rollout, named_gradients, objective, pack_rollout, randomize, run, small_config


@pytest.mark.parametrize("common", [0, 4], ids=["groups", "trees"])
@pytest.mark.parametrize("rules", [{}, {"window_size": [4, 0], "attn_logit_softcapping": 2.0}], ids=["plain", "rules"])
def test_selective_and_full_recompute_equal_none_bitwise(common, rules, rng, world):
    """fp32, several groups: the recomputed pass must see the same record and do the same sums."""
    weights = build_gpt(small_config(), world)
    randomize(weights, rng)
    rollout = make_rollout(rng, [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5])], 61, common)
    batch = pack_rollout(rollout)
    results, passes = {}, {}
    for granularity in (None, "selective", "full"):
        model = build_gpt(small_config(activations_checkpoint_granularity=granularity, **rules), world)
        model.load_state_dict(weights.state_dict())
        count: list[int] = []
        attention = model.decoder.layers[0].self_attention.core_attention
        attention.register_forward_hook(lambda *args, seen=count: seen.append(1))
        logprobs, entropy = run(model, batch)
        objective(rollout, batch.groups, logprobs, entropy).backward()
        results[granularity] = {"logprobs": logprobs.detach(), "entropy": entropy.detach()} | named_gradients(model)
        passes[granularity] = len(count)
    assert passes == {None: 1, "selective": 2, "full": 2}  # it did recompute
    for granularity in ("selective", "full"):
        assert results[granularity].keys() == results[None].keys()
        for name, value in results[None].items():
            assert torch.equal(value, results[granularity][name]), (granularity, name)
    assert all(torch.count_nonzero(v) for v in results[None].values())
