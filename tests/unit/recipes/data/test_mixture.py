"""The order in which rows of several sets are drawn: shares, epochs, ranks, and the way back to a position."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from recipes.data.drawing import draw_order
from recipes.data.mixture import MixedSampler, Share
from recipes.data.rows import load_pairs
from recipes.data.sampler import EpochSampler
from recipes.data.settings import RowsSection, TrainSetSection
from recipes.grpo.settings import GRPOData
from recipes.sft.settings import SFTData
from tests.data_cases import write_rows, write_table

SETS = st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 9.0)), min_size=1, max_size=4)


def shares_of(sets, epochs=None):
    return [Share(f"s{i}", count, weight, epochs) for i, (count, weight) in enumerate(sets)]


def drawn_by_set(indices, shares):
    """(set, row of it) of each index."""
    places = [(i, row) for i, share in enumerate(shares) for row in range(share.count)]
    return [places[index] for index in indices]


@settings(max_examples=30, deadline=None)
@given(SETS, st.integers(0, 99))
def test_sets_have_their_shares_at_any_time_and_epochs_of_their_own(sets, seed):
    shares = shares_of(sets)
    sampler = MixedSampler(shares, 1, 200, seed, 0, 1)
    found = drawn_by_set([sampler.next()[0] for _ in range(200)], shares)
    total, counts = sum(s.weight for s in shares), Counter()
    for n, (i, _) in enumerate(found, 1):
        counts[i] += 1
        for j, share in enumerate(shares):
            assert abs(counts[j] - n * share.weight / total) < len(shares), (n, j)
    for i, share in enumerate(shares):
        rows = [row for j, row in found if j == i]
        for start in range(0, len(rows) - share.count + 1, share.count):
            assert sorted(rows[start : start + share.count]) == list(range(share.count))


@settings(max_examples=20, deadline=None)
@given(SETS, st.integers(0, 99), st.integers(0, 30))
def test_a_position_comes_back_on_any_number_of_ranks(sets, seed, steps):
    shares = shares_of(sets)
    sampler = MixedSampler(shares, 6, 99, seed, 0, 1)
    for _ in range(steps):
        sampler.next()
    state = json.loads(json.dumps(sampler.state_dict()))
    other = copy.copy(sampler)
    rest = [sampler.next() for _ in range(8)]
    assert [other.next() for _ in range(8)] == rest  # a copy goes its own way, as sampling ahead needs
    ranks = [MixedSampler(shares, 6, 99, seed, rank, 3) for rank in range(3)]
    for rank in ranks:
        rank.next()
        rank.load_state_dict(state)
    assert [sum(parts, []) for parts in zip(*([r.next() for _ in range(8)] for r in ranks), strict=True)] == rest


def test_a_set_ends_with_its_epochs_and_the_others_go_on():
    shares = [Share("a", 10, 1.0, 1.5), Share("b", 7, 1.0)]
    sampler = MixedSampler(shares, 1, 60, 3, 0, 1)
    found = drawn_by_set([sampler.next()[0] for _ in range(60)], shares)
    assert Counter(i for i, _ in found[:30]) == {0: 15, 1: 15} and {i for i, _ in found[30:]} == {1}
    ended = [Share("a", 10, 1.0, 1.5), Share("b", 7, 1.0, 1)]
    with pytest.raises(
        UserError, match="hold 22 rows with their epochs, and 6 steps of 4 take 24: make it 5 steps or less"
    ):
        MixedSampler(ended, 4, 6, 3, 0, 1)
    sampler = MixedSampler(ended, 1, 22, 3, 0, 1)
    assert len({sampler.next()[0] for _ in range(22)}) == 17
    with pytest.raises(UserError, match="all sets of data.train_sets have been drawn as often as their epochs say"):
        sampler.next()


def test_without_weights_all_rows_count_alike():
    rows = {"a": range(30), "b": range(10)}
    order = draw_order(rows, {"a": TrainSetSection("x"), "b": TrainSetSection("y")}, 4, 99, 1, 0, 1)
    assert all(Counter(i < 30 for i in order.next()) == {True: 3, False: 1} for _ in range(50))
    order = draw_order(rows, {"a": TrainSetSection("x", epochs=1), "b": TrainSetSection("y", epochs=3)}, 4, 15, 1, 0, 1)
    drawn = Counter(i for _ in range(15) for i in order.next())
    assert drawn == {i: 1 if i < 30 else 3 for i in range(40)}
    assert isinstance(draw_order({"": rows["a"]}, {}, 4, 99, 1, 0, 1), EpochSampler)


def test_another_mixture_is_not_gone_on_with():
    state = MixedSampler([Share("a", 3, 1.0)], 1, 9, 1, 0, 1).state_dict()
    for other, seed in (([Share("a", 4, 1.0)], 1), ([Share("b", 3, 1.0)], 1), ([Share("a", 3, 1.0)], 2)):
        with pytest.raises(UserError, match="continue with the same data.train_sets and model.seed"):
            MixedSampler(other, 1, 9, seed, 0, 1).load_state_dict(state)
    with pytest.raises(UserError, match="batch=4 .* is not divisible by world=3"):
        MixedSampler([Share("a", 3, 1.0)], 4, 9, 1, 0, 3)


def test_a_mixture_of_jsonl_and_parquet_goes_on_at_the_exact_row(tmp_path, plain):
    """As a run reads and draws it, stopped at any step."""
    names = [[f"{kind} {i}" for i in range(count)] for kind, count in (("fox", 11), ("dog", 23))]
    write_rows(tmp_path / "a.jsonl", *({"prompt": name, "response": " it"} for name in names[0]))
    write_table(tmp_path / "b.parquet", [{"question": name, "response": " it"} for name in names[1]])
    sets = {
        "fox": TrainSetSection(str(tmp_path / "a.jsonl"), 2.0),
        "dog": TrainSetSection(str(tmp_path / "b.parquet"), 1.0, fields={"prompt": "question"}),
    }

    def begin():
        data = SFTData(None, train_sets=sets)
        rows = {name: load_pairs(s.path, plain, 99, None, data.of_set(s)) for name, s in data.trained.items()}
        pairs = [pair for each in rows.values() for pair in each]
        return pairs, draw_order(rows, data.trained, 5, 40, 7, 0, 1)

    pairs, order = begin()
    steps = [[pairs[i].where for i in order.next()] for _ in range(40)]
    stop = random.randrange(40)
    pairs, first = begin()
    for _ in range(stop):
        first.next()
    pairs, second = begin()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [[pairs[i].where for i in second.next()] for _ in range(40 - stop)] == steps[stop:]
    of_parquet = sum(".parquet, row " in where for step in steps for where in step)
    assert abs(of_parquet - 200 / 3) < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"a": TrainSetSection("x", 1.0), "b": TrainSetSection("y")},
            "train_sets.b has no weight, and others have one",
        ),
        ({"a": TrainSetSection("x", 0.0)}, "data.train_sets.a.weight=0.0 must be above 0"),
        ({"a": TrainSetSection("x", epochs=-1)}, "data.train_sets.a.epochs=-1 must be above 0"),
        ({"a.b": TrainSetSection("x")}, "'a.b' names a set: use letters"),
        ({"a": TrainSetSection("held")}, "data.train_sets.a.path and data.validation_path are the same file, held"),
    ],
)
def test_sets_that_are_refused(changes, message):
    for cls in (SFTData, GRPOData):
        with pytest.raises(UserError, match=message):
            cls(None, validation_path="held", train_sets=changes)
    with pytest.raises(UserError, match="data.train_path=x and data.train_sets are both set"):
        SFTData("x", train_sets={"a": TrainSetSection("y")})
    with pytest.raises(UserError, match="data.train_path is null: name the file"):
        SFTData(None)
    assert RowsSection().trained == {}
