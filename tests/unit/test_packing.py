"""Groups packed into microbatches by a token budget: nothing lost, nothing over budget, work in balance."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.flops import ModelShape, model_flops, num_tokens
from megatron_ext.packing import Part, pack_groups, saving_kept, split_group

SHAPE = ModelShape(2, 64, 4, 128, 500, 4, 16)
lengths_strategy = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(0, 20), min_size=1, max_size=6)), min_size=4, max_size=12
)


def tokens(part: Part, lengths) -> int:
    prompt, responses = lengths[part.group]
    return prompt + sum(responses[i] for i in part.responses)


@given(lengths_strategy, st.integers(50, 120), st.integers(1, 4))
def test_every_response_is_in_one_microbatch_and_none_is_over_budget(lengths, budget, ranks):
    packed = pack_groups(lengths, budget, ranks, SHAPE)
    assert len(packed) == ranks and all(packed)
    seen = [(p.group, i) for rank in packed for microbatch in rank for p in microbatch for i in p.responses]
    assert sorted(seen) == [(g, i) for g, (_, responses) in enumerate(lengths) for i in range(len(responses))]
    for rank in packed:
        for microbatch in rank:
            assert sum(tokens(p, lengths) for p in microbatch) <= budget
    repeated = pack_groups(lengths, budget, ranks, SHAPE, share_prefix=False)
    alone = [p for rank in repeated for microbatch in rank for p in microbatch]
    assert sorted((p.group, *p.responses) for p in alone) == sorted(seen), "every response with a prompt of its own"
    assert all(sum(tokens(p, lengths) for p in m) <= budget for rank in repeated for m in rank)
    whole = [g for g, (p, r) in enumerate(lengths) if p + sum(r) <= budget]
    parts = [p.group for rank in packed for microbatch in rank for p in microbatch]
    assert all(parts.count(g) == 1 for g in whole), "a group that fits is never split"


@given(st.integers(1, 50), st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(0, 60))
def test_a_split_keeps_the_saving_that_its_number_of_parts_leaves(prompt, responses, extra):
    budget = prompt + max(responses) + extra
    parts = split_group(prompt, responses, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(responses)))
    assert all(prompt + sum(responses[i] for i in part) <= budget for part in parts)
    m, g = len(parts), len(responses)
    kept = saving_kept([(prompt, responses)], [[Part(0, tuple(part))] for part in parts])
    assert kept == pytest.approx((g - m) / (g - 1) if g > 1 else 1.0)


def test_work_is_balanced_over_ranks():
    """Attention counts: a rank with long prompts gets fewer tokens."""
    rng = random.Random()
    lengths = [(rng.choice([100, 800, 6000]), [rng.randint(20, 400) for _ in range(8)]) for _ in range(64)]
    packed = pack_groups(lengths, 12000, 4, SHAPE)
    work = [
        sum(
            model_flops(SHAPE, [(lengths[p.group][0], [lengths[p.group][1][i] for i in p.responses])]).total
            for microbatch in rank
            for p in microbatch
        )
        for rank in packed
    ]
    assert max(work) <= 1.1 * sum(work) / 4
    flat = [microbatch for rank in packed for microbatch in rank]
    assert saving_kept(lengths, flat) == 1.0
    budget_used = sum(num_tokens([lengths[p.group]]) for m in flat for p in m) / (12000 * len(flat))
    assert budget_used > 0.6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_group(10, [5, 41], 50), "prompt of 10 tokens and a response of 41 exceed the budget of 50"),
        (lambda: pack_groups([(5, [1, 1])], 50, 2, SHAPE), "1 groups cannot be spread over 2"),
    ],
)
def test_refuses_what_cannot_be_packed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
