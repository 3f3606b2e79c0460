"""Context-parallel attention equals one rank's in fp64: outputs and gradients, for random trees, in both forms."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.attention import Scoring
from megatron_ext.attention.reference import attention_mask
from megatron_ext.grouping import PrefixGroups
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.scenarios import ContextCase, context_attention
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
            cases.append(ContextCase(forest, inputs, comm_type, Scoring(DIM**-0.5, 0.8, window=9)))
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
        out = plain_tree_attention(*leaves, case.lengths, softcap=case.scoring.softcap, window=case.scoring.window)
        out.backward(grad)
        expected = [out.detach(), *(x.grad for x in leaves)]
        for name, a, b in zip(("out", "dq", "dk", "dv"), whole([r[number] for r in ranks]), expected, strict=True):
            assert error(a, b) <= BOUND, f"{name} of {case} differs by {error(a, b)}"


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
