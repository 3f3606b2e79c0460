"""Rows of one prompt one behind the other, and rows from easy to hard."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from megatron_ext.errors import UserError
from recipes.data.curriculum import CurriculumSection, bins_of
from recipes.data.drawing import draw_order
from recipes.data.errors import DataError
from recipes.data.files import Place
from recipes.data.rows import Pair, Prompt, load_prompts
from recipes.data.settings import RowsSection, TrainSetSection
from tests.data_cases import refused, write_rows


def prompts(values, key="difficulty"):
    return [Prompt((i,), {key: x}, i + 1, place=Place("rows.jsonl", i + 1)) for i, x in enumerate(values)]


def drawn(order, steps):
    return [order.next_batch() for _ in range(steps)]


def test_rows_of_a_prompt_come_together_and_in_another_order_each_epoch():
    rng = random.Random()
    names = [rng.randrange(12) for _ in range(60)]
    pairs = [Pair(Prompt((name,), {}, i), (i,)) for i, name in enumerate(names)]
    order = draw_order({"": pairs}, {}, 6, 99, rng.randrange(99), 0, 1, together=True)
    epochs = [sum(drawn(order, 10), []) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(60))
        seen = [names[i] for i in epoch]
        assert sum(a != b for a, b in zip(seen, seen[1:], strict=False)) == len(set(names)) - 1
    assert epochs[0] != epochs[1] != epochs[2]
    sets = {"a": pairs[:20], "b": pairs[20:]}
    mixed = draw_order(sets, {n: TrainSetSection("x", 1.0) for n in sets}, 6, 9, 1, 0, 1, together=True)
    of_a = [names[i] for step in drawn(mixed, 6) for i in step if i < 20][:18]
    assert sum(a != b for a, b in zip(of_a, of_a[1:], strict=False)) <= len(set(names[:20]))


def test_bins_are_of_equally_many_rows_or_as_their_edges_say():
    scores = random.sample(range(1000), 22)
    rows = prompts(scores)
    bins = bins_of(CurriculumSection(steps=8, bins=4), rows, 2)
    assert [len(b) for b in bins] == [5, 6, 5, 6] and sorted(sum(bins, [])) == list(range(22))
    for easy, hard in zip(bins, bins[1:], strict=False):
        assert max(scores[i] for i in easy) < min(scores[i] for i in hard)
    turned = bins_of(CurriculumSection(steps=8, bins=4, larger_is_easier=True), rows, 2)
    assert min(scores[i] for i in turned[0]) > max(scores[i] for i in turned[-1])
    given = prompts([0.1, 0.3, 0.5, 0.9, 0.7, 0.0])
    assert bins_of(CurriculumSection(steps=8, edges=[0.3, 0.7]), given, 1) == [[0, 5], [1, 2], [3, 4]]
    assert bins_of(CurriculumSection(steps=8, edges=[0.3, 0.7], larger_is_easier=True), given, 1) == [
        [3, 4],
        [1, 2],
        [0, 5],
    ]


def test_bins_open_one_after_the_other_and_then_all_are_drawn_as_they_are_large():
    section = CurriculumSection(steps=9, bins=3)
    rows = prompts(range(30))
    order = draw_order({"": rows}, {}, 4, 99, 5, 0, 1, curriculum=section)
    steps = drawn(order, 60)
    stages = [Counter(i // 10 for step in steps[a:b] for i in step) for a, b in ((0, 3), (3, 6), (6, 60))]
    assert stages == [{0: 12}, {0: 6, 1: 6}, {0: 72, 1: 72, 2: 72}]
    for number in range(3):  # all of a bin before any of it comes again
        of_bin = [i for step in steps for i in step if i // 10 == number]
        for start in range(0, len(of_bin) - 9, 10):
            assert len(set(of_bin[start : start + 10])) == 10
    weights = [[1, 0, 0], [3, 1, 0], [0, 0, 1]]
    order = draw_order({"": rows}, {}, 4, 99, 5, 0, 1, curriculum=CurriculumSection(steps=9, bins=3, weights=weights))
    steps = drawn(order, 12)
    stages = [Counter(i // 10 for step in steps[a:b] for i in step) for a, b in ((0, 3), (3, 6), (6, 12))]
    assert stages == [{0: 12}, {0: 9, 1: 3}, {2: 24}]


def test_a_curriculum_goes_on_at_the_exact_row_on_any_number_of_ranks():
    rows, section = prompts(random.sample(range(99), 40)), CurriculumSection(steps=12, bins=4)
    given = ({"": rows}, {}, 6, 99, 3)
    whole = drawn(draw_order(*given, 0, 1, curriculum=section), 30)
    stop = random.randrange(30)
    first = draw_order(*given, 0, 1, curriculum=section)
    drawn(first, stop)
    first.has_next()
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [draw_order(*given, rank, 2, curriculum=section) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    assert [a + b for a, b in zip(*([r.next() for _ in range(30 - stop)] for r in ranks), strict=True)] == whole[stop:]
    assert all(len(set(step)) == 6 for step in whole[:1])  # later, where a bin begins anew, a row may come twice


def test_a_run_does_not_go_on_with_other_bins():
    """Of as many rows each: numbers were rewritten in place."""
    scores = random.sample(range(99), 12)
    section = CurriculumSection(steps=4, bins=2)

    def order(scores):
        return draw_order({"": prompts(scores)}, {}, 2, 9, 3, 0, 1, curriculum=section)

    state = json.loads(json.dumps(order(scores).state_dict()))
    order([2 * x for x in scores]).load_state_dict(state)
    ranked = sorted(range(12), key=scores.__getitem__)
    a, b = random.choice(ranked[:6]), random.choice(ranked[6:])
    scores[a], scores[b] = scores[b], scores[a]
    with pytest.raises(UserError, match="data.curriculum puts rows into other bins than when the run began"):
        order(scores).load_state_dict(state)
    del state["members"]  # of a checkpoint from before
    order(scores).load_state_dict(state)


def test_scores_of_a_file_belong_to_lines(tmp_path, plain):
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": f"fox {i}"} for i in range(6)))
    rows = load_prompts(path, plain, 99)
    scores = [{"line": i + 1, "right": 1 - i / 10} for i in range(6)]
    random.shuffle(scores)
    section = CurriculumSection(
        steps=4, bins=2, field="right", scores=str(write_rows(tmp_path / "s.jsonl", *scores)), larger_is_easier=True
    )
    assert bins_of(section, rows, 1) == [[0, 1, 2], [3, 4, 5]]
    named = [{"file": "a.jsonl", **score} for score in scores]
    write_rows(tmp_path / "s.jsonl", *named)
    assert bins_of(section, rows, 1) == [[0, 1, 2], [3, 4, 5]]
    write_rows(tmp_path / "s.jsonl", *named[:-1])
    assert f"a.jsonl:{named[-1]['line']}: data.curriculum.scores=" in refused(bins_of, section, rows, 1)
    write_rows(tmp_path / "s.jsonl", named[0], named[0])
    assert "s.jsonl:2: the score of a.jsonl" in refused(bins_of, section, rows, 1)


def test_rows_of_a_curriculum_have_their_number(tmp_path, plain):
    section = RowsSection(curriculum=CurriculumSection(steps=4, bins=2, field="pass_rate"))
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": "fox", "pass_rate": i} for i in range(6)), {"prompt": "fox"})
    rows = load_prompts(path, plain, 99, section=section, reward_keys=())
    assert len(bins_of(section.curriculum, rows[:6], 1)) == 2
    message = refused(bins_of, section.curriculum, rows, 1)
    assert (
        message
        == f"{path}:7: pass_rate must be a number that says how hard the row is (data.curriculum.field), got nothing"
    )
    for value, got in (("hard", "a string"), (True, "true or false")):
        assert got in refused(bins_of, section.curriculum, prompts([value], "pass_rate"), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "data.curriculum.steps=0 must be at least 1"),
        ({"steps": 3}, "steps=3 is less than its 4 stages"),
        ({"steps": 4, "edges": [1, 0]}, r"edges=\[1, 0\] must rise"),
        ({"steps": 4, "bins": 2, "weights": [[1]]}, r"weights has \[1\] for 2 bins"),
        ({"steps": 4, "bins": 2, "weights": [[0, 0]]}, "numbers, 0 or more, and one above 0"),
        ({"steps": 4, "bins": 2, "weights": []}, "weights is empty"),
    ],
)
def test_curricula_that_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        CurriculumSection(**changes)


def test_what_does_not_go_together_is_refused():
    rows = prompts([1, 2, 3, 4])
    with pytest.raises(UserError, match="bin 1 of 2 has no rows .numbers go from 1.0 to 4.0."):
        bins_of(CurriculumSection(steps=4, edges=[0.5]), rows, 1)
    with pytest.raises(UserError, match="the bins of stage 1 have 2 rows, fewer than the 3 of a step"):
        bins_of(CurriculumSection(steps=4, bins=2), rows, 3)
    curriculum = CurriculumSection(steps=4)
    from recipes.grpo.settings import GRPOData
    from recipes.sft.settings import SFTData

    for cls in (SFTData, GRPOData):
        with pytest.raises(UserError, match="data.streaming=true reads them when they are drawn"):
            cls("x", streaming=True, curriculum=curriculum)
        with pytest.raises(UserError, match="data.curriculum makes bins of one set"):
            cls(None, train_sets={"a": TrainSetSection("x")}, curriculum=curriculum)
    with pytest.raises(UserError, match="data.keep_together=true looks at the prompts of all rows"):
        SFTData("x", streaming=True, keep_together=True)
    with pytest.raises(DataError):
        bins_of(curriculum, prompts([None]), 1)
