"""The counts of megatron_ext.flops: against the attention plan, against brute force, and against published figures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from megatron_ext.attention.plan import plan_attention
from megatron_ext.flops import (
    BACKWARD_OVER_FORWARD,
    ModelShape,
    attention_flops,
    attention_pairs,
    ideal_attention_speedup,
    ideal_speedup,
    model_flops,
    num_predicted,
    num_tokens,
    sharing_pays,
)
from megatron_ext.grouping import PrefixGroups
from megatron_ext.models.config import GPTModelConfig
from tests.strategies import lengths_strategy

ROOT = Path(__file__).parents[2]
# A published 4B model: 36 layers, 32 query and 8 key/value heads of 128.
FOUR_B = ModelShape(36, 2560, 32, 9728, 151_936, 8, 128)
TINY = ModelShape(
    num_layers=3,
    hidden_size=16,
    num_attention_heads=4,
    ffn_hidden_size=20,
    vocab_size=50,
    num_query_groups=2,
    kv_channels=4,
)


streams = given(lengths=lengths_strategy)


def repeat(lengths) -> list[tuple[int, list[int]]]:
    return [(p, [s]) for p, suffixes in lengths for s in suffixes]


@streams
def test_pairs_are_those_of_the_attention_plan(lengths):
    """The plan counts the diagonal whole, the formula half: t / 2 pairs less."""
    planned = plan_attention(PrefixGroups.from_lengths(lengths)).num_scores
    assert attention_pairs(lengths) == planned - num_tokens(lengths) / 2


@pytest.mark.parametrize("shape", [TINY, FOUR_B])
def test_a_tokens_linears_cost_as_much_as_so_many_pairs(shape):
    alone = [(0, [1])]
    linears = model_flops(shape, alone).linear / shape.num_layers
    pair = attention_flops(alone, shape.num_attention_heads, shape.kv_channels) / attention_pairs(alone)
    assert shape.pairs_per_token == pytest.approx(linears / pair, rel=1e-12)


@streams
def test_tokens_and_predicted_tokens_are_those_of_the_record(lengths):
    record = PrefixGroups.from_lengths(lengths)
    assert num_tokens(lengths) == record.num_tokens
    assert num_tokens(lengths, share_prefix=False) == record.num_repeated_tokens
    assert num_predicted(lengths) == record.num_predicted_tokens


@streams
def test_repeated_is_the_shared_form_of_groups_of_one(lengths):
    responses = [(p, s) for p, s in lengths if s]  # a prompt without responses does not appear in the repeated form
    assert attention_pairs(lengths, False) == attention_pairs(repeat(lengths), True)
    assert num_tokens(lengths, False) == num_tokens(repeat(lengths), True)
    assert model_flops(TINY, responses, False) == model_flops(TINY, repeat(responses), True)


def test_responses_of_one_group_are_worth_no_more_together_than_apart_plus_their_prefix():
    """Sharing saves exactly (G - 1) prefixes."""
    p, suffixes = 11, (3, 4, 9)
    saved = model_flops(TINY, [(p, suffixes)], False).total - model_flops(TINY, [(p, suffixes)], True).total
    assert saved == pytest.approx((len(suffixes) - 1) * model_flops(TINY, [(p, ())]).total)


def test_closed_form_of_equal_responses():
    p, g, s = 4096, 8, 256
    expected = g * (p + s) ** 2 / (p**2 + g * s * (2 * p + s))
    assert ideal_attention_speedup([(p, (s,) * g)]) == pytest.approx(expected)


def count_by_hand(shape: ModelShape, lengths) -> int:
    """Forward operations of the shared form, matrix by matrix."""
    h, n, m, d = shape.hidden_size, shape.num_attention_heads, shape.num_query_groups, shape.kv_channels
    weights = (
        [(h, n * d), (h, m * d), (h, m * d), (n * d, h)]
        + 2 * [(h, shape.ffn_hidden_size)]
        + [(shape.ffn_hidden_size, h)]
    )
    tokens = sum(p + sum(suffixes) for p, suffixes in lengths)
    layer = sum(2 * tokens * rows * columns for rows, columns in weights)
    predicted = sum(s if p else max(s - 1, 0) for p, suffixes in lengths for s in suffixes)
    return shape.num_layers * layer + 2 * predicted * h * shape.vocab_size


@streams
def test_model_is_the_sum_of_its_matrices(lengths):
    flops = model_flops(TINY, lengths, backward=False)
    assert flops.linear + flops.vocabulary == count_by_hand(TINY, lengths)
    assert flops.attention == TINY.num_layers * 2 * 2 * 4 * 4 * attention_pairs(lengths)  # QK^T and PV, 4 heads of 4
    assert flops.total == flops.linear + flops.attention + flops.vocabulary


@streams
def test_backward_counts_twice_the_forward(lengths):
    forward, both = (model_flops(TINY, lengths, backward=b).total for b in (False, True))
    assert both == pytest.approx((1 + BACKWARD_OVER_FORWARD) * forward)
    assert attention_flops(lengths, 4, 4) == pytest.approx(3 * attention_flops(lengths, 4, 4, backward=False))


def test_vocabulary_rows_do_not_depend_on_sharing():
    lengths = [(300, (20, 7, 0)), (0, (5, 1))]
    assert model_flops(TINY, lengths, True).vocabulary == model_flops(TINY, lengths, False).vocabulary


@pytest.mark.parametrize(
    ("p", "s", "g", "published"),
    [(4096, 512, 8, 4.1), (8192, 1024, 8, 4.0), (16384, 512, 8, 6.1), (4096, 4096, 8, 1.6), (1024, 8192, 16, 1.08)],
)
def test_figures_quoted_in_the_documentation(p, s, g, published):
    digits = len(str(published).split(".")[1])
    assert round(ideal_speedup(FOUR_B, [(p, (s,) * g)]), digits) == published


@streams
def test_speedup_stays_within_its_bounds(lengths):
    """Never below 1, never above the largest G, and 1 where nothing is shared."""
    lengths = [(7, [3, 5]), *((p, s) for p, s in lengths if s)]  # never without a token
    assert 1 <= ideal_speedup(TINY, lengths) <= max(len(s) for _, s in lengths)
    assert ideal_speedup(TINY, [(9, (4,)), (5, (2,))]) == 1
    assert ideal_speedup(TINY, [(0, (4, 3))]) == 1


def test_grouped_query_attention_saves_weights_only():
    lengths = [(30, (4, 5))]
    many, few = (model_flops(replace(TINY, num_query_groups=m), lengths, backward=False) for m in (4, 2))
    assert many.attention == few.attention
    assert many.linear - few.linear == 2 * TINY.num_layers * num_tokens(lengths) * 16 * 2 * 2 * 4


def test_shape_of_a_config_counts_the_padded_vocabulary():
    config = GPTModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, vocab_size=100, num_query_groups=2
    )
    assert ModelShape.of(config) == ModelShape(2, 32, 4, 48, 112, 2, 8)


def test_refuses_a_speedup_of_nothing():
    with pytest.raises(ValueError, match="at least one token"):
        ideal_attention_speedup([(0, (0,)), (0, ())])


def test_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import megatron_ext.flops"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    ("lengths", "pays"),
    [
        ([(500, [10] * 8)], True),
        ([(1, [500] * 8)], False),
        ([(500, [10])], False),
        ([(500, [10]), (500, [9, 9])], True),
    ],
)
def test_sharing_pays_where_prompts_are_long_and_repeated(lengths, pays):
    assert sharing_pays(ModelShape(2, 64, 4, 128, 500, 4, 16), lengths) == pays
