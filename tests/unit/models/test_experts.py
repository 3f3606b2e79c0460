"""Mixture of experts under prefix groups, in fp64: sharing the prefix changes neither outputs nor any gradient, nor what looks at
all tokens together: the auxiliary loss, experts' biases, their load."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ext.blocks.places import ModelPlace
from megatron_ext.blocks.training import train_only_places
from megatron_ext.errors import UserError
from megatron_ext.grouping import PrefixGroups
from megatron_ext.models import PrefixGroupedGPT, build_gpt, specs
from megatron_ext.models.experts import expert_layer
from megatron_ext.models.router import choose_experts
from megatron_ext.runtime.engine import Engine, Microbatch, Skipping
from megatron_ext.runtime.expert_load import finish_step, routers_of
from megatron_ext.runtime.optim import OptimConfig
from tests.engine_cases import edges_of
from tests.gpt_cases import make_rollout, named_gradients, objective, pack_rollout, randomize, run, small_config
from tests.layouts import error, random_nested
from tests.plain_gpt import plain_logprobs

BOUND = 1e-10
LENGTHS = [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5]), (3, [9])]
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "num_query_groups": 8}
MODELS = {
    "softmax": EXPERTS,
    "softmax of all": EXPERTS | {"moe_router_norm_topk_prob": False, "moe_layer_freq": 2, "qk_layernorm_across_heads": True},
    "sigmoid, bias, groups": EXPERTS | SIGMOID | {
        "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 4, "moe_router_topk_scaling_factor": 2.5,
    },
    "shared": EXPERTS | {"moe_shared_expert_intermediate_size": 24, "moe_layer_freq": [0, 1], "moe_router_topk": 1},
    "shared with a gate": EXPERTS | {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True},
}  # fmt: skip
models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


def build(rng, world, **changes) -> PrefixGroupedGPT:
    model = build_gpt(small_config(**changes), world)
    randomize(model, rng)
    for router in routers_of([model]):
        if router.expert_bias is not None:
            router.expert_bias.copy_(0.3 * torch.randn(len(router.expert_bias), generator=rng))
    return model.double()


def loads(model: PrefixGroupedGPT) -> list[Tensor]:
    return [router.load.clone() for router in routers_of([model])]


def both_forms(model: PrefixGroupedGPT, rollout) -> list[tuple[Tensor, dict[str, Tensor], list[Tensor]]]:
    """(log-probabilities, gradients, load of each layer), of the grouped and of the repeated form."""
    results = []
    for share in (True, False):
        batch = pack_rollout(rollout, share)
        logprobs, entropy = run(model, batch, temperature=0.9)
        objective(rollout, batch.groups, logprobs, entropy).backward()
        results.append((logprobs.detach(), named_gradients(model), loads(model)))
        finish_step(routers_of([model]), applied=False)
    return results


def assert_same(found, expected, bound: float = BOUND) -> None:
    assert error(found[0], expected[0]) <= bound
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert error(gradient, expected[1][name]) <= bound * max(1, expected[1][name].abs().max().item()), name
    assert sum(bool(torch.count_nonzero(g)) for g in found[1].values()) > len(found[1]) // 2
    assert found[2] and all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))


@models
def test_grouped_equals_a_plain_gpt(changes, rng, world):
    """One document after the other, one token after the other through its experts; experts without tokens have no gradient."""
    model = build(rng, world, **changes)
    rollout = make_rollout(rng, LENGTHS, 61)
    batch = pack_rollout(rollout)
    logprobs, entropy = run(model, batch, temperature=0.9)
    loss = objective(rollout, batch.groups, logprobs, entropy)
    loss.backward()

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    biases = {name: b.double() for name, b in model.named_buffers() if name.endswith("expert_bias")}
    parts = [plain_logprobs(weights | biases, model.model_config, p, r, 0.9) for p, r in rollout.flat if r]
    plain, plain_entropy = (torch.cat(x) for x in zip(*parts, strict=True))
    objective(rollout, batch.groups, plain, plain_entropy).backward()
    assert logprobs.dtype == torch.float64 and error(logprobs.detach(), plain.detach()) <= BOUND
    for name, gradient in named_gradients(model).items():
        expected = weights[name].grad
        assert error(gradient, torch.zeros_like(gradient) if expected is None else expected) <= BOUND, name
        assert expected is not None or "local_experts" in name


@pytest.mark.parametrize(
    ("common", "coefficient"), [(0, 0.0), (4, 0.7)], ids=["groups", "trees with an auxiliary loss"]
)
@models
def test_grouped_equals_repeated(changes, coefficient, common, rng, world):
    model = build(rng, world, **changes, moe_aux_loss_coeff=coefficient)
    rollout = make_rollout(rng, LENGTHS, 61, common)
    grouped, repeated = both_forms(model, rollout)
    assert_same(grouped, repeated)
    tokens = pack_rollout(rollout).groups.num_repeated_tokens
    assert [load.sum().item() for load in grouped[2]] == [tokens * model.model_config.moe_router_topk] * len(grouped[2])


def test_the_auxiliary_loss_is_that_of_its_definition(rng, world):
    """And reaches the router, and nothing behind it, by its own gradient."""
    model = build(rng, world, **EXPERTS, moe_aux_loss_coeff=0.7, num_layers=1)
    batch = pack_rollout(make_rollout(rng, LENGTHS, 61), share_prefix=False, pad=1)
    seen = []
    (router,) = routers_of([model])
    router.register_forward_hook(lambda module, args, out: seen.append((args[0].detach(), out[1])))
    logprobs, _ = run(model, batch)
    (0 * logprobs.sum()).backward()
    ((hidden, taken),) = seen
    weight = router.weight.detach().clone().requires_grad_()
    scores = (hidden[:, 0] @ weight.t()).softmax(-1)
    share = taken.double().mean(0)  # of the tokens that take an expert
    loss = 0.7 * 8 / 2 * (share * scores.mean(0)).sum()
    loss.backward()
    assert abs(router.balance_loss.item() - loss.item()) <= BOUND
    gradients = named_gradients(model)
    assert error(gradients["decoder.layers.0.mlp.router.weight"], weight.grad) <= BOUND
    assert not any(torch.count_nonzero(g) for name, g in gradients.items() if "experts" in name or "output" in name)


def test_megatrons_own_router_agrees_to_its_precision(rng, world, monkeypatch):
    """It computes in fp32 whatever the weights are."""
    rollout, clear = make_rollout(rng, LENGTHS, 61), False
    changes = EXPERTS | {"moe_router_norm_topk_prob": False}
    while not clear:  # rounding may choose an expert where two are wanted alike
        model = build(rng, world, **changes)
        clear = edges_of(model, rollout).clear
    (mine, _), results = both_forms(model, rollout), []

    class Theirs(TopKRouter):
        def __init__(self, config, rules, pg_collection):
            super().__init__(config=config, pg_collection=pg_collection)

        def reading(self, record):
            return contextlib.nullcontext()

    monkeypatch.setattr(specs, "expert_layer", functools.partial(expert_layer, router=Theirs))
    other = build_gpt(small_config(**changes), world).double()
    assert isinstance(other.decoder.layers[0].mlp.router, Theirs)
    other.load_state_dict(model.state_dict(), strict=False)
    for share in (True, False):
        batch = pack_rollout(rollout, share)
        logprobs, entropy = run(other, batch, temperature=0.9)
        objective(rollout, batch.groups, logprobs, entropy).backward()
        results.append((logprobs.detach(), named_gradients(other), mine[2]))
    for found in results:
        assert 0 < error(found[0], mine[0]) <= 1e-6
        assert all(error(g, mine[1][name]) <= 1e-6 * max(1, mine[1][name].abs().max()) for name, g in found[1].items())
    assert_same(results[0], results[1], 1e-6)


def test_rows_count_as_often_as_responses_have_them(rng):
    """Of random trees, with groups of no response and a pad."""
    trees = [random_nested(rng) for _ in range(4)] + [(3, [])]
    groups = PrefixGroups.from_lengths(trees, pad_to_multiple=16)
    expected = torch.zeros(groups.num_tokens, dtype=torch.int64)
    for number, tree in enumerate(groups.trees):
        for leaf in tree.leaves:
            for node in {0, *tree.path(leaf)}:
                for segment in groups.segments:
                    if (segment.group, segment.node) == (number, node):
                        expected[segment.start : segment.start + segment.length] += 1
    assert torch.equal(groups.response_counts, expected)
    assert int(expected.sum()) == groups.num_repeated_tokens


def test_a_step_moves_biases_towards_idle_experts_by_logical_counts(rng, world):
    """Grouped and repeated alike, also where streams are split; not where no step is taken."""
    found, clear = [], False
    rollout = make_rollout(rng, LENGTHS, 61)
    while not clear:  # rounding may choose an expert where two are wanted alike
        model = build(rng, world, **EXPERTS | SIGMOID).float()
        clear = edges_of(model, rollout).clear
    weights = model.state_dict()
    for share, cuts in ((True, [[0, 1, 2, 3]]), (False, [[0, 1, 2, 3]]), (True, [[0, 1], [2, 3]])):
        model = build_gpt(small_config(**EXPERTS | SIGMOID, moe_router_bias_update_rate=0.01), world)
        model.load_state_dict(weights)
        engine = Engine(model, OptimConfig(lr=1e-3), skipping=Skipping(most=9))
        streams = [Microbatch(pack_rollout(rollout.pick(numbers), share)) for numbers in cuts]
        engine.zero_grad()
        engine.run(streams, lambda microbatch, logprobs, entropy: (logprobs.sum(), {}))
        counted = loads(model)
        report = engine.step()
        for router, load in zip(routers_of([model]), counted, strict=True):
            name = f"decoder.layers.{router.layer_number - 1}.mlp.router.expert_bias"
            moved = router.expert_bias - weights[name]
            assert error(moved, 0.01 * (load.mean() - load).sign()) <= 1e-7 and torch.count_nonzero(moved)
            assert not torch.count_nonzero(router.load)
        assert report["expert_load_max"] == pytest.approx(max((x.max() / x.mean()).item() for x in counted))
        engine.zero_grad()
        engine.run(streams, lambda microbatch, logprobs, entropy: (logprobs.sum() * torch.nan, {}))
        before = [router.expert_bias.clone() for router in routers_of([model])]
        assert engine.step()["skipped"]
        assert all(torch.equal(r.expert_bias, b) for r, b in zip(routers_of([model]), before, strict=True))
        found.append((counted, before))
    for counted, biases in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(counted, found[0][0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(biases, found[0][1], strict=True))


def test_what_is_frozen_keeps_its_biases_and_what_ran_before_a_step_is_not_counted(rng, world):
    model = build(rng, world, **EXPERTS | SIGMOID, moe_router_bias_update_rate=0.01).float()
    batch = pack_rollout(make_rollout(rng, LENGTHS, 61))
    run(model, batch)
    assert all(torch.count_nonzero(load) for load in loads(model))
    train_only_places(model, [ModelPlace(1)])
    engine = Engine(model, OptimConfig(lr=1e-3))
    before = [router.expert_bias.clone() for router in engine.routers]
    engine.zero_grad()
    engine.run([Microbatch(batch)], lambda microbatch, logprobs, entropy: (logprobs.sum(), {}))
    taken = batch.groups.num_repeated_tokens * model.model_config.moe_router_topk
    assert [load.sum().item() for load in loads(model)] == [taken] * 2
    engine.step()
    same = [torch.equal(router.expert_bias, bias) for router, bias in zip(engine.routers, before, strict=True)]
    assert same == [True, False]


def test_the_auxiliary_loss_of_a_step_is_shared_out_by_logical_tokens(rng, world):
    """Two streams: each one's loss by its share of the tokens of both."""
    engine = Engine(build(rng, world, **EXPERTS, moe_aux_loss_coeff=0.5).float())

    def loss_of(streams: list[Microbatch]) -> float:
        engine.run(streams, lambda microbatch, logprobs, entropy: (0 * logprobs.sum(), {}))
        return finish_step(engine.routers, applied=False)["balance_loss"]

    first = second = 0.0
    while first == pytest.approx(second, rel=1e-2):  # of equal losses any shares would do
        rollout = make_rollout(rng, LENGTHS, 61)
        streams = [Microbatch(pack_rollout(rollout.pick(numbers))) for numbers in ([0, 1], [2, 3])]
        first, second = loss_of(streams[:1]), loss_of(streams[1:])
    sizes = [m.batch.groups.num_repeated_tokens for m in streams]
    expected = (first * sizes[0] + second * sizes[1]) / sum(sizes)
    assert loss_of(streams) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_is_bitwise(granularity, rng, world):
    """And counts tokens once."""
    changes = MODELS["sigmoid, bias, groups"] | {"moe_aux_loss_coeff": 0.3}
    rollout = make_rollout(rng, LENGTHS, 61, common=4)
    batch, results = pack_rollout(rollout), []
    weights = build(rng, world, **changes).float().state_dict()
    for recompute in (None, granularity):
        model = build_gpt(small_config(**changes, activations_checkpoint_granularity=recompute), world)
        model.load_state_dict(weights)
        logprobs, entropy = run(model, batch)
        objective(rollout, batch.groups, logprobs, entropy).backward()
        results.append((logprobs.detach(), named_gradients(model), loads(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(g, results[1][1][name]) for name, g in results[0][1].items())
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))


def test_scores_do_not_overflow_where_all_lie_far_below_zero(rng):
    logits = torch.tensor([[-1e4, -2e4, -3e4, -4e4]], dtype=torch.float64)
    for changes in ({}, {"moe_router_score_function": "sigmoid"}):
        config = small_config(num_moe_experts=4, **changes)
        _, _, weights = choose_experts(logits, config, None)
        assert torch.isfinite(weights).all()


def test_experts_of_a_layer_begin_apart(world):
    """Each expert is drawn for itself."""
    model = build_gpt(small_config(**EXPERTS), world)
    first = [e.linear_fc1.weight for e in model.decoder.layers[0].mlp.experts.local_experts]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (EXPERTS | {"moe_expert_capacity_factor": 1.0}, "which tokens are dropped depends on the others"),
        ({"moe_token_dropping": True}, "set them to null and false"),
        (EXPERTS | {"hidden_dropout": 0.1}, "a shared prefix would be dropped once per group"),
        ({"moe_ffn_hidden_size": 16}, "moe_ffn_hidden_size=16 needs experts, and model.num_moe_experts is null"),
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size=2 needs experts"),
        ({"moe_router_topk": 4}, "moe_router_topk=4 needs experts"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function=sigmoid needs experts"),
        ({"moe_router_norm_topk_prob": False}, "moe_router_norm_topk_prob=False needs experts"),
        (EXPERTS | {"moe_router_topk": 9}, r"moe_router_topk=9 must lie in 1 .. model.num_moe_experts=8"),
        (EXPERTS | {"moe_router_score_function": "tanh"}, "must be one of softmax, sigmoid, got 'tanh'"),
        (EXPERTS | {"moe_router_num_groups": 3, "moe_router_group_topk": 1}, "=3 does not divide model.num_moe_experts=8"),
        (EXPERTS | {"moe_router_group_best": 1}, "model.moe_router_group_best=1 needs model.moe_router_num_groups"),
        (EXPERTS | GROUPS | {"moe_router_group_best": 3}, "model.moe_router_group_best=3 must lie in 1 .. 2, the experts"),
        (EXPERTS | GROUPS | {"moe_router_topk": 3}, "does not divide model.moe_router_topk=3: set model.moe_router_group_best"),
        (EXPERTS | {"moe_router_num_groups": 4}, "give both or neither"),
        (EXPERTS | {"moe_router_bias_update_rate": 0.1}, "needs model.moe_router_enable_expert_bias=true"),
        (EXPERTS | {"moe_layer_freq": [1]}, "give 0 or 1 for each of the 2 layers"),
        (EXPERTS | {"moe_shared_expert_gate": True}, "needs model.moe_shared_expert_intermediate_size"),
        (EXPERTS | {"tensor_model_parallel_size": 2}, "needs model.sequence_parallel=true"),
        (EXPERTS | {"expert_model_parallel_size": 3}, "=8 is not divisible by model.expert_model_parallel_size=3"),
        (
            EXPERTS | {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
            "needs model.expert_model_parallel_size > 1",
        ),
        ({"qk_layernorm": False, "qk_layernorm_across_heads": True}, "needs model.qk_layernorm=true"),
        (EXPERTS | {"fp8": "hybrid", "precision": "bf16"}, "model.fp8=hybrid with experts is not computed here"),
        ({"add_bias_linear": True}, "needs experts in all layers and no shared one"),
        (EXPERTS | {"add_bias_linear": True, "moe_shared_expert_intermediate_size": 8}, "and no shared one"),
        (
            EXPERTS
            | {
                "add_bias_linear": True, "tensor_model_parallel_size": 2, "sequence_parallel": True,
                "moe_grouped_gemm": True,
            },
            "expert_tensor_parallel_size=2: experts are then Megatron's own linears",
        ),
        ({"activation": "quick_gelu"}, "is computed in experts alone"),
        (EXPERTS | {"activation": "gelu"}, "model.activation must be one of silu, quick_gelu, got 'gelu'"),
        (EXPERTS | {"glu_linear_offset": 1.0}, "need model.activation=quick_gelu"),
        (EXPERTS | {"activation": "quick_gelu", "activation_func_clamp_value": 0.0}, "must be above 0"),
        (EXPERTS | {"moe_grouped_gemm": True, "transformer_impl": "local"}, "model.transformer_impl=local does without"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        small_config(**changes)
    assert "\n" not in str(caught.value)


def test_a_grouped_product_needs_transformer_engine(world):
    with pytest.raises(
        UserError, match="model.moe_grouped_gemm=true needs Transformer Engine, which is not in use here"
    ):
        build_gpt(small_config(**EXPERTS, moe_grouped_gemm=True), world)
