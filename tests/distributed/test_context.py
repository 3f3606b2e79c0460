"""Context-parallel attention equals one rank's in fp64: outputs and gradients, for random trees, in both forms; and so do whole
models with all that attention and MLPs may be."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.attention import Scoring
from megatron_ext.attention.reference import attention_mask
from megatron_ext.grouping import PrefixGroups
from megatron_ext.models import build_gpt
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import RopeScaling
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.context_scenarios import (
    ContextCase,
    FormsCase,
    both_forms,
    context_attention,
    gathered_rows,
    latent_traffic,
)
from tests.distributed.sharding import full_name, shard
from tests.gpt_cases import LATENT, make_rollout, randomize, small_config
from tests.harness import run_ranks
from tests.layouts import error, plain_tree_attention, randn, random_nested

pytestmark = pytest.mark.distributed

BOUND = 1e-10
HEADS, KV_HEADS, DIM = 8, 4, 16
PLAIN = Scoring(DIM**-0.5)
FIXED = [
    [(37, [11, 5, 0, 8]), (3, [2, 2])],
    [(4, [90, 3])],  # a response longer than a rank's share
    [(64, [])],  # a prompt alone
    [(1, [1])],  # fewer rows than chunks
    [(9, [(5, [4, (3, [2, 6])]), 7, (2, [3, 3])])],
]
YARN = RopeScaling(4.0, original_max_position_embeddings=16, rope_type="yarn", beta_fast=4.0)
SINKS = {"softmax_type": "learnable", "window_size": [6, 0], "window_attn_skip_freq": 2}
EXPERTS = {"num_moe_experts": 8, "moe_ffn_hidden_size": 16, "moe_aux_loss_coeff": 0.7}
SIGMOID = {
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_topk": 4,
    "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
MODELS = {
    "latent, yarn": LATENT,
    "sinks, windows": SINKS,
    "sinks, a2a": SINKS | {"cp_comm_type": "a2a"},
    "yarn": {"position_embedding": PositionEmbedding(scaling=YARN)},
    "experts": EXPERTS,
    "experts, latent": EXPERTS | SIGMOID | LATENT,
}


def make_cases(rng: torch.Generator, comm_types: list[str]) -> list[ContextCase]:
    forests = FIXED + [[random_nested(rng, 1 + i % 4, 12) for _ in range(2)] for i in range(8)]
    cases = []
    for forest in forests:
        t = PrefixGroups.from_lengths(forest).num_tokens
        inputs = tuple(randn(rng, t, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
        for comm_type in comm_types:
            cases.append(ContextCase(forest, inputs, comm_type, PLAIN))
            window = int(torch.randint(7, (), generator=rng))
            cases.append(ContextCase(forest, inputs, comm_type, Scoring(DIM**-0.5, window=window)))
            sinks = randn(rng, HEADS)
            cases.append(ContextCase(forest, inputs, comm_type, Scoring(DIM**-0.5, 0.8, window=9), sinks=sinks))
    perturbed = PrefixGroups.from_lengths(FIXED[0]).num_tokens
    for row in range(0, perturbed, 9):
        for scoring in (PLAIN, Scoring(DIM**-0.5, window=6)):
            cases.append(ContextCase(FIXED[0], cases[0].inputs, comm_types[0], scoring, perturb=row))
    cases += [ContextCase(FIXED[0], cases[0].inputs, comm_types[0], Scoring(DIM**-0.5, window=6))]
    return cases


@pytest.fixture(scope="module", params=[2, 4])
def runs(request):
    """(cases, their results on every rank)."""
    cases = make_cases(fresh_generator(), ["all_gather", "a2a"])
    ranks = run_ranks(context_attention, request.param, cases, sizes=ParallelSizes(context=request.param))
    return cases, ranks


def whole(results: list[dict]) -> list[torch.Tensor]:
    """[out, dq, dk, dv] of the stream, put together from its ranks."""
    rows = torch.cat([r["rows"] for r in results])
    assert rows.sort().values.tolist() == list(range(len(rows)))
    return [torch.cat([r["parts"][i] for r in results])[rows.argsort()] for i in range(4)]


def test_equals_one_rank(runs):
    cases, ranks = runs
    for number, case in enumerate(cases):
        if case.perturb is not None:
            continue
        q, k, v, grad = case.inputs
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        sinks = None if case.sinks is None else case.sinks.clone().requires_grad_()
        rules = {"softcap": case.scoring.softcap, "window": case.scoring.window, "sinks": sinks}
        out = plain_tree_attention(*leaves, case.lengths, **rules)
        out.backward(grad)
        if sinks is not None:  # of all ranks together
            assert error(sum(r[number]["sinks"] for r in ranks), sinks.grad) <= BOUND
        expected = [out.detach(), *(x.grad for x in leaves)]
        for name, a, b in zip(("out", "dq", "dk", "dv"), whole([r[number] for r in ranks]), expected, strict=True):
            assert error(a, b) <= BOUND, f"{name} of {case} differs by {error(a, b)}"


@pytest.mark.parametrize("experts", [1, 2], ids=["cp2", "cp2 ep2"])
def test_grouped_equals_repeated_in_whole_models(experts, rng, world):
    """On one rank, and on two in both forms: log-probabilities and all gradients, of groups and of trees. Experts are balanced by
    logical counts."""
    models = [fields for fields in MODELS.values() if experts == 1 or "num_moe_experts" in fields]
    lengths, cases = [(21, [9, 13, 4]), (2, [1, 3]), (6, [0, 5]), (3, [2])], []
    for fields in models:
        model = build_gpt(small_config(**fields), world).double()
        randomize(model, rng)
        weights = {name: 0.3 * randn(rng, len(b)) for name, b in model.named_buffers() if name.endswith("expert_bias")}
        weights |= {name: p.detach() for name, p in model.named_parameters()}
        cases.append(FormsCase(fields, weights, [make_rollout(rng, lengths, 61, common) for common in (0, 4)]))
    expected = both_forms(world, cases)["cases"]
    layout = {"context_parallel_size": 2, "expert_model_parallel_size": experts}
    spread = [FormsCase(case.fields | layout, case.weights, case.rollouts) for case in cases]
    ranks = run_ranks(both_forms, 2, spread, sizes=ParallelSizes(context=2, expert=experts))
    for number, (case, one) in enumerate(zip(spread, expected, strict=True)):
        config = small_config(**case.fields)
        for rollout, (grouped, repeated) in enumerate(one):
            assert repeated[0].dtype == torch.float64 and len(repeated[0]) > 20
            assert_same(grouped, repeated)
            for rank in ranks:
                cut = {}
                for name in rank["cases"][number][rollout][0][1]:
                    full = full_name(name, config, 0, rank["experts"][0])
                    cut[name] = shard(full, repeated[1][full], config, 0)
                for found in rank["cases"][number][rollout]:
                    assert_same(found, (repeated[0], cut))


def assert_same(found: tuple, expected: tuple) -> None:
    """Log-probabilities, and gradients by name."""
    assert error(found[0], expected[0]) <= BOUND and found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert error(found[1][name], gradient) <= BOUND * max(1, gradient.abs().max().item()), name
        assert torch.count_nonzero(gradient) or "local_experts" in name, name


def test_of_latent_attention_compressed_rows_travel(rng):
    """Once forward and once back, for each layer; and log-probabilities and entropies."""
    fields = LATENT | {"context_parallel_size": 2}
    rollout = make_rollout(rng, [(13, [5, 9, 2]), (6, [4, 4])], 61)
    width = LATENT["kv_lora_rank"] + LATENT["qk_pos_emb_head_dim"]
    for told in run_ranks(latent_traffic, 2, rollout, fields, sizes=ParallelSizes(context=2)):
        rows = [(2 * told["sent"], width)] * told["layers"]
        assert told["gathered"] == [*rows, *[(2 * told["predicted"],)] * 2] and told["scattered"] == rows
        assert 19 <= 2 * told["sent"] <= 21  # the prompts', once


def test_gradients_of_gathered_rows_are_summed_in_fp32_and_only_what_is_sent_is_widened():
    for found in run_ranks(gathered_rows, 2, FIXED[0], 6, sizes=ParallelSizes(context=2)):
        # Each of three numbers of bf16 is exact in fp32: what is left is the last rounding.
        assert torch.equal(found["grad"], found["expected"].float().bfloat16())
        assert found["widest"] == found["sent"] < found["all"]


def test_only_shared_keys_travel(runs):
    """Counted in the collectives: the rows of prefixes and cut responses, padded to the busiest rank's; never G P."""
    cases, ranks = runs
    for number, case in enumerate(cases):
        for result in (r[number] for r in ranks):
            rows = result["received"] / (KV_HEADS * 2 * DIM)  # keys and values together
            if case.comm_type == "a2a":
                assert rows == 0
            else:
                assert result["gathered"] <= rows <= result["gathered"] + 2 * len(ranks) * result["cut"]
    plain = next(i for i, c in enumerate(cases) if c.lengths == FIXED[0] and c.comm_type == "all_gather")
    assert ranks[0][plain]["gathered"] == 37 + 3


def test_a_perturbed_token_changes_only_rows_that_may_see_it(runs):
    cases, ranks = runs
    groups = PrefixGroups.from_lengths(FIXED[0])
    seen = 0
    for number, case in enumerate(cases):
        if case.perturb is None:
            continue
        undisturbed = next(
            i
            for i, c in enumerate(cases)
            if c.perturb is None and (c.lengths, c.scoring, c.comm_type) == (case.lengths, case.scoring, case.comm_type)
        )
        before = whole([r[undisturbed] for r in ranks])[0]
        mask = attention_mask(groups, case.scoring.window)
        changed = (whole([r[number] for r in ranks])[0] != before).flatten(1).any(1)
        assert not bool((changed & ~mask[:, case.perturb]).any()) and bool(changed[case.perturb])
        seen += 1
    assert seen >= 12
