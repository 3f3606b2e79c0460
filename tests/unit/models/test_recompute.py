"""Activation recomputation, also with layers' inputs on the host, gives bitwise the gradients of keeping the activations."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.models import build_gpt
from megatron_ext.runtime.activation_offload import LayerInputs
from tests.gpt_cases import make_rollout, named_gradients, objective, pack_rollout, randomize, run, small_config
from tests.held_bytes import saved_here_and_there


@pytest.mark.parametrize("common", [0, 4], ids=["groups", "trees"])
@pytest.mark.parametrize("rules", [{}, {"window_size": [4, 0], "attn_logit_softcapping": 2.0}], ids=["plain", "rules"])
def test_selective_and_full_recompute_equal_none_bitwise(common, rules, rng, world):
    """fp32, several groups: the recomputed pass must see the same record and do the same sums."""
    weights = build_gpt(small_config(), world)
    randomize(weights, rng)
    rollout = make_rollout(rng, [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5])], 61, common)
    batch = pack_rollout(rollout)
    results, passes = {}, {}
    for granularity in (None, "selective", "full", "on the host"):
        offload = granularity == "on the host"
        keys = {"activations_checkpoint_granularity": "full" if offload else granularity, "activation_offload": offload}
        model = build_gpt(small_config(**keys, **rules), world)
        model.load_state_dict(weights.state_dict())
        count: list[int] = []
        attention = model.decoder.layers[0].self_attention.core_attention
        attention.register_forward_hook(lambda *args, seen=count: seen.append(1))
        logprobs, entropy = run(model, batch)
        objective(rollout, batch.groups, logprobs, entropy).backward()
        results[granularity] = {"logprobs": logprobs.detach(), "entropy": entropy.detach()} | named_gradients(model)
        passes[granularity] = len(count)
    assert passes == {None: 1, "selective": 2, "full": 2, "on the host": 2}  # it did recompute
    for granularity in ("selective", "full", "on the host"):
        assert results[granularity].keys() == results[None].keys()
        for name, value in results[None].items():
            assert torch.equal(value, results[granularity][name]), (granularity, name)
    assert all(torch.count_nonzero(v) for v in results[None].values())


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_inputs_of_layers_are_on_the_host_alone(precision, rng, world):
    """Nothing but them moves: what autograd keeps on the device is less by as much, and they are what layers were given."""
    batch = pack_rollout(make_rollout(rng, [(11, [2, 7, 7]), (6, [0, 5])], 61))
    given: list[torch.Tensor] = []
    found = {}
    for offload in (False, True):
        config = small_config(
            num_layers=3, precision=precision, activations_checkpoint_granularity="full", activation_offload=offload
        )
        model = build_gpt(config, world)
        found[offload] = saved_here_and_there(model, batch)
    inputs = 3 * batch.groups.num_tokens * 32 * (4 if precision == "32" else 2)
    assert found[False][1] == 0 and found[True] == (found[False][0] - inputs, inputs)
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda m, a, k: given.append(k["hidden_states"].detach()), with_kwargs=True)
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        pack = LayerInputs.pack
        patch.setattr(LayerInputs, "pack", lambda self, x: kept.append(pack(self, x)) or kept[-1])
        run(model, batch)
    hosts = [k.host for k in kept if not isinstance(k, torch.Tensor)]
    assert len(hosts) == len(given) == 3 and all(torch.equal(a, b) for a, b in zip(hosts, given, strict=True))


def test_scoring_keeps_nothing(rng, world):
    model = build_gpt(small_config(activations_checkpoint_granularity="full", activation_offload=True), world)
    batch = pack_rollout(make_rollout(rng, [(4, [2, 3])], 61))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerInputs, "pack", None)
        assert len(run(model, batch)[0]) == 5


@pytest.mark.parametrize("granularity", [None, "selective"])
def test_without_full_recomputation_it_is_refused(granularity):
    with pytest.raises(UserError, match=r"activations_checkpoint_granularity=full, got (null|selective)"):
        small_config(activations_checkpoint_granularity=granularity, activation_offload=True)
