"""A two-layer Megatron GPT in fp64: sharing the prefix changes neither log-probabilities nor any gradient.

Compared with the repeated stream through the same model, with one response at a time through the same model, and with
a GPT in plain PyTorch. The bound 1e-10 lies far above fp64 rounding and far below any wrong term.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.attention import PrefixGroupedCoreAttention
from megatron_ext.grouping import PrefixGroups, unpack
from megatron_ext.models import PrefixGroupedGPT, build_gpt
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import RopeScaling
from tests.gpt_cases import LATENT, make_rollout, named_gradients, objective, pack_rollout, randomize, run, small_config
from tests.layouts import LAYOUTS, error
from tests.plain_gpt import plain_logprobs

BOUND = 1e-10
CASES = {
    "several groups": [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5]), (3, [9])],
    "no prefix": [(0, [4, 2]), (5, [3, 3, 3])],
}
tied = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
cases = pytest.mark.parametrize("case", CASES)
# Windows that hide a part of some prompts, in one layer or both; scores that the cap bends.
RULES = {
    "one call": {"attention_plan": "one_call"},
    "window": {"window_size": [4, 0]},
    "window in layer 1, softcap": {"window_size": [3, 0], "window_attn_skip_freq": 2, "attn_logit_softcapping": 1.5},
    "window in layer 2": {"window_size": [0, 0], "window_attn_skip_freq": [0, 1]},
    "sinks, layer 2 does not rotate": {"softmax_type": "learnable", "no_rope_freq": [0, 1]},
    "latent": LATENT,
    "latent, queries as they are, sinks": LATENT | {"q_lora_rank": None, "softmax_type": "learnable", "v_head_dim": 10},
    "multipliers": {
        "embedding_multiplier": 1.7, "residual_multiplier": 0.4, "logits_scaling": 1.3, "attention_multiplier": 0.2,
    },
    "softmax off by one, yarn": {
        "softmax_type": "off-by-one", "window_size": [4, 0], "position_embedding": PositionEmbedding(
            scaling=RopeScaling(4.0, original_max_position_embeddings=32, rope_type="yarn", beta_fast=3.0)
        ),
    },
}  # fmt: skip


def build(rng, world, **changes) -> PrefixGroupedGPT:
    model = build_gpt(small_config(**changes), world)
    randomize(model, rng)
    return model.double()


def weights_of(model: PrefixGroupedGPT) -> dict[str, Tensor]:
    """Leaf copies of the weights, for the plain model."""
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None and torch.count_nonzero(gradient), name
        assert error(gradient, expected[name]) <= BOUND, f"{name} differs by {error(gradient, expected[name])}"


@tied
@cases
@pytest.mark.parametrize("common", [0, 4], ids=["groups", "trees"])
def test_grouped_equals_repeated(case, tied, common, rng, world):
    """Values, loss and EVERY parameter's gradient through the GRPO loss, with clipping, KL and entropy."""
    model = build(rng, world, share_embeddings_and_output_weights=tied)
    rollout = make_rollout(rng, CASES[case], 61, common)
    assert (pack_rollout(rollout).groups.expand_index is None) == (common == 0)
    results = []
    for share in (True, False):
        batch = pack_rollout(rollout, share)
        logprobs, entropy = run(model, batch, temperature=0.9)
        loss = objective(rollout, batch.groups, logprobs, entropy)
        loss.backward()
        results.append((logprobs.detach(), entropy.detach(), loss.detach(), named_gradients(model)))
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        assert a.dtype == torch.float64 and error(a, b) <= BOUND
    assert_same_gradients(results[0][3], results[1][3])


@pytest.mark.parametrize(
    "changes",
    [{"share_embeddings_and_output_weights": True}, {"share_embeddings_and_output_weights": False}, *RULES.values()],
    ids=["tied", "untied", *RULES],
)
@cases
def test_grouped_equals_a_plain_gpt(case, changes, rng, world):
    """The same against a model that shares no code with Megatron, one document after the other."""
    model = build(rng, world, **changes)
    rollout = make_rollout(rng, CASES[case], 61)
    batch = pack_rollout(rollout)
    logprobs, entropy = run(model, batch, temperature=0.9)
    loss = objective(rollout, batch.groups, logprobs, entropy)
    loss.backward()

    weights = weights_of(model)
    parts = [plain_logprobs(weights, model.model_config, p, r, 0.9) for p, r in rollout.flat if r]
    plain, plain_entropy = (torch.cat(x) for x in zip(*parts, strict=True))
    plain_loss = objective(rollout, batch.groups, plain, plain_entropy)
    plain_loss.backward()
    assert error(logprobs.detach(), plain.detach()) <= BOUND
    assert error(entropy.detach(), plain_entropy.detach()) <= BOUND
    assert error(loss.detach(), plain_loss.detach()) <= BOUND
    assert_same_gradients(named_gradients(model), {name: w.grad for name, w in weights.items()})


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_trees_equal_repeated_with_windows_and_softcap(rules, rng, world):
    model = build(rng, world, **rules)
    rollout = make_rollout(rng, CASES["several groups"], 61, common=4)
    results = []
    for share in (True, False):
        batch = pack_rollout(rollout, share)
        logprobs, entropy = run(model, batch)
        objective(rollout, batch.groups, logprobs, entropy).backward()
        results.append((logprobs.detach(), named_gradients(model)))
    assert error(results[0][0], results[1][0]) <= BOUND
    assert_same_gradients(results[0][1], results[1][1])


def test_grouped_equals_one_response_at_a_time(rng, world):
    """Each response as an ordinary document of its own, its gradients added up."""
    model = build(rng, world)
    rollout = make_rollout(rng, CASES["several groups"], 61)
    batch = pack_rollout(rollout)
    logprobs, _ = run(model, batch)
    factors = torch.linspace(-1, 1, len(logprobs), dtype=torch.float64)
    (logprobs * factors).sum().backward()
    grouped = named_gradients(model)
    for number, (found, factor) in enumerate(
        zip(unpack(logprobs.detach(), batch.groups), unpack(factors, batch.groups), strict=True)
    ):
        prompt, response = rollout.flat[number]
        single = pack_rollout(make_rollout(rng, [(len(prompt), [len(response)])], 61), pad=1)
        single.tokens.copy_(torch.tensor(prompt + response))
        alone, _ = run(model, single)
        (alone * factor).sum().backward()
        assert error(found, alone.detach()) <= BOUND
    assert_same_gradients(grouped, named_gradients(model))


def test_first_response_tokens_are_trained(rng, world):
    """Peers lose them. Their log-probabilities alone have a gradient, in every weight, equal to the repeated one's."""
    model = build(rng, world)
    rollout = make_rollout(rng, [(7, [3, 1, 4]), (2, [2, 5])], 61)
    gradients = []
    for share in (True, False):
        batch = pack_rollout(rollout, share)
        logprobs, _ = run(model, batch)
        first = batch.groups.response_token_index == 0
        assert int(first.sum()) == 5  # one for every response
        logprobs[first].sum().backward()
        gradients.append(named_gradients(model))
    assert_same_gradients(*gradients)


def test_grouping_lowers_the_rows_every_layer_runs(rng, world):
    """Counted inside the layers, not computed from lengths: the stream's rows, and fewer than when repeated."""
    model = build(rng, world)
    rollout = make_rollout(rng, [(40, [3] * 8), (17, [5, 2])], 61)
    rows: list[int] = []
    attention = [m for m in model.modules() if isinstance(m, PrefixGroupedCoreAttention)]
    for module in attention:
        module.register_forward_hook(lambda module, args, out: rows.append(args[0].size(0)))
    counts = {}
    for share in (True, False):
        batch = pack_rollout(rollout, share)
        rows.clear()
        run(model, batch)
        assert rows == [batch.groups.num_tokens] * 2 and len(attention) == 2
        counts[share] = sum(rows)
    assert counts[True] < counts[False] / 3


def test_siblings_are_isolated_bitwise(rng, world):
    """Other tokens in one response change no bit of another response's log-probabilities or entropies."""
    model = build(rng, world).float()
    rollout = make_rollout(rng, [(13, [6, 4, 6]), (5, [3])], 61)
    batch = pack_rollout(rollout)
    before = [unpack(x.detach(), batch.groups) for x in run(model, batch)]
    changed = [s for s in batch.groups.segments if s.group == 0 and s.response == 1][0]
    rows = slice(changed.start, changed.start + changed.length)
    batch.tokens[rows] = (batch.tokens[rows] + 1 + torch.arange(4)) % 61
    after = [unpack(x.detach(), batch.groups) for x in run(model, batch)]
    for a, b in zip(before, after, strict=True):
        assert all(torch.equal(a[i], b[i]) for i in (0, 2, 3))
    assert not torch.equal(before[0][1], after[0][1])


def test_pad_rows_and_pad_length_change_nothing(rng, world):
    """Not the pad's tokens, bitwise; nor its length, to rounding."""
    model = build(rng, world)
    rollout = make_rollout(rng, CASES["several groups"], 61)
    batch, longer = pack_rollout(rollout, pad=16), pack_rollout(rollout, pad=96)
    assert 0 < batch.groups.num_pad_tokens < longer.groups.num_pad_tokens
    before, _ = run(model, batch)
    batch.tokens[-batch.groups.num_pad_tokens :] = 17
    after, _ = run(model, batch)
    assert torch.equal(before, after)
    assert error(before.detach(), run(model, longer)[0].detach()) <= BOUND


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_padding_of_the_vocabulary_gets_no_probability(tied, rng, world):
    """61 tokens in 64 rows: probabilities of the 61 sum to 1, and untied padding rows get no gradient."""
    model = build(rng, world, share_embeddings_and_output_weights=tied)
    groups = PrefixGroups.from_lengths([(5, [1] * 61)])
    tokens = torch.cat((torch.randint(61, (5,), generator=rng), torch.arange(61)))
    logprobs, _ = model(tokens, groups.position_ids, groups, labels=tokens[groups.target_index])
    assert abs(logprobs.exp().sum().item() - 1) <= BOUND
    (logprobs * torch.linspace(0, 1, 61)).sum().backward()
    gradient = named_gradients(model)["embedding.word_embeddings.weight" if tied else "output_layer.weight"]
    assert torch.count_nonzero(gradient[61:]) == 0 and torch.count_nonzero(gradient[:61])


@pytest.mark.parametrize("name", ["no response", "one response"])
def test_streams_that_predict_little_or_nothing(name, rng, world):
    """A stream without responses runs, predicts nothing, and gives every weight a zero gradient."""
    model = build(rng, world)
    lengths, _ = LAYOUTS[name]
    rollout = make_rollout(rng, lengths, 61)
    logprobs, entropy = run(model, pack_rollout(rollout))
    assert logprobs.shape == entropy.shape == (sum(sum(s) for _, s in lengths),)
    (logprobs.sum() + entropy.sum()).backward()
    gradients = named_gradients(model)
    assert all(bool(torch.count_nonzero(g)) == bool(lengths[0][1]) for g in gradients.values())
