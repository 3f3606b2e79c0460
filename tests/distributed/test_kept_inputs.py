"""What enters the trained block is computed once: the same numbers under every layout, and nothing below is run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext.blocks.places import parse_places
from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.kept_scenarios import KeptCase, kept_inputs
from tests.distributed.sharding import full_name, shard
from tests.engine_cases import relative_error
from tests.gpt_cases import randomize, small_config
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

BOUND = 1e-5  # fp32, as in test_layouts.py
LAYERS, VOCAB, HIDDEN = 4, 61, 32
ROOM = 1 << 30
PAIRS, TEXTS = 7, 5
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 24}
LAYOUTS = {
    "tp2 sp": (2, ParallelSizes(tensor=2), {"sequence_parallel": True}),
    "pp2": (2, ParallelSizes(pipeline=2), {}),
    "tp2 pp2": (4, ParallelSizes(tensor=2, pipeline=2), {}),
    "dp2": (2, ParallelSizes(), {}),
    "pp2 dp2": (4, ParallelSizes(pipeline=2), {}),
}


def draw_case(world, place: Any, **fields) -> KeptCase:
    rng = fresh_generator()
    model = build_gpt(small_config(num_layers=LAYERS, **fields), world)
    randomize(model, rng)

    def rows(count: int, least: int) -> list[list[int]]:
        lengths = torch.randint(least, 14, (count,), generator=rng).tolist()
        return [torch.randint(VOCAB, (length,), generator=rng).tolist() for length in lengths]

    kinds = {"pairs": rows(PAIRS, 1), "texts": rows(TEXTS, 2)}
    order = {kind: torch.randperm(len(found), generator=rng).tolist() for kind, found in kinds.items()}
    pairs, texts = order["pairs"], order["texts"]
    batches = [("pairs", pairs[:3]), ("pairs", pairs[3:6]), ("texts", texts[:2]), ("texts", texts[2:4])]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return KeptCase({"num_layers": LAYERS} | fields, weights, place, kinds, batches)


def lowest(case: KeptCase) -> int:
    return parse_places(case.place)[0].block


def changed(case: KeptCase, **fields) -> KeptCase:
    return KeptCase(**{**vars(case), **fields})


@pytest.fixture(scope="module", params=[0, {"block": 2, "heads": [5, 6]}, {"block": 3, "part": "mlp"}])
def case(request, world):
    case = draw_case(world, request.param)
    (whole,) = run_ranks(kept_inputs, 1, case)
    return case, whole


def assert_same(found: dict, expected: dict, case: KeptCase, fields: dict) -> None:
    config, (tp_rank, stage) = small_config(**fields), found["ranks"]
    for kind, rows in expected["said"].items():
        for told in ("said", "again"):
            assert relative_error(torch.cat(found[told][kind]), torch.cat(rows)) <= BOUND, kind
    for step, metrics in enumerate(found["metrics"]):
        for key, value in metrics.items():
            assert value == pytest.approx(expected["metrics"][step][key], rel=BOUND, abs=BOUND), key
    for name, value in found["parameters"].items():
        full = full_name(name, config, stage)
        before, after = (shard(full, x[full], config, tp_rank, tp_rank) for x in (case.weights, expected["parameters"]))
        if f"layers.{lowest(case)}." in full and not torch.equal(before, after):
            assert relative_error(value, after) <= BOUND and not torch.equal(value, before), full
        else:
            assert torch.equal(value, before), full


def assert_nothing_below_ran(found: dict, case: KeptCase) -> None:
    assert all(block >= lowest(case) for block in found["ran"]), found["ran"]


def test_one_rank(case, tmp_path):
    """From memory and from disk, bitwise alike."""
    case, whole = case
    runs = [run_ranks(kept_inputs, 1, changed(case, limit=ROOM, folder=folder))[0] for folder in (None, tmp_path)]
    tokens = sum(len(row) + 2 for row in case.rows["pairs"]) + sum(map(len, case.rows["texts"]))
    for found in runs:
        assert found["left"] == [] and found["kept"] == 4 * HIDDEN * tokens
        assert_same(found, whole, case, case.fields)
        assert_nothing_below_ran(found, case)
    assert set(whole["ran"]) == set(range(LAYERS)) and set(found["ran"]) == set(range(lowest(case), LAYERS))
    assert found["ran"][LAYERS - 1] == whole["ran"][LAYERS - 1]
    assert all(torch.equal(runs[0]["parameters"][name], value) for name, value in runs[1]["parameters"].items())
    assert not list(tmp_path.iterdir()), "files are gone as soon as they are mapped"


def test_the_same_streams_say_the_same_bitwise(case):
    """What is asked the second time has the streams of the first."""
    case, _ = case
    (found,) = run_ranks(kept_inputs, 1, changed(case, limit=ROOM))
    for kind, rows in found["said"].items():
        assert all(torch.equal(a, b) for a, b in zip(rows, found["again"][kind], strict=True)), kind


def test_rows_without_room_are_run_as_a_whole(case):
    case, whole = case
    room = 4 * HIDDEN * sum(len(row) + 2 for row in case.rows["pairs"])
    (found,) = run_ranks(kept_inputs, 1, changed(case, limit=room))
    assert found["left"] == ["texts"] and found["kept"] == room
    assert_same(found, whole, case, case.fields)
    streams_of_texts = 1 + 2 * 2  # asked again, and two of each step
    assert {b: found["ran"].get(b, 0) for b in range(lowest(case))} == dict.fromkeys(
        range(lowest(case)), streams_of_texts
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name, case):
    case, whole = case
    world_size, sizes, changes = LAYOUTS[name]
    fields = case.fields | changes | sizes.named
    ranks = run_ranks(kept_inputs, world_size, changed(case, fields=fields, limit=ROOM), sizes=sizes)
    for found in ranks:
        assert_same(found, whole, case, fields)
        assert_nothing_below_ran(found, case)


def test_experts_choose_alike_where_what_enters_their_block_is_kept(world):
    """In the streams that were asked about, bitwise: these have no pad, which enters as zeros and would meet other experts. The
    load that is told is that of the layers that ran."""
    case = draw_case(world, {"block": 2, "part": "mlp"}, **EXPERTS)
    for kind, words in ("pairs", 2), ("texts", 0):
        rows = case.rows[kind]
        rows[0] = rows[0] + [VOCAB - 1] * (-sum(len(row) + words for row in rows) % stream_multiple(small_config()))
    case = changed(case, batches=[("pairs", list(range(PAIRS))), ("texts", list(range(TEXTS)))])
    (whole,), (found,) = (run_ranks(kept_inputs, 1, changed(case, limit=limit)) for limit in (None, ROOM))
    assert_nothing_below_ran(found, case)
    for expected, metrics in zip(whole["metrics"], found["metrics"], strict=True):
        assert 1 <= metrics.pop("expert_load_max") <= expected.pop("expert_load_max")
        assert metrics == expected and metrics["grad_norm"] > 0
    assert all(torch.equal(found["parameters"][name], value) for name, value in whole["parameters"].items())
    assert any(not torch.equal(value, case.weights[name]) for name, value in whole["parameters"].items())


@pytest.mark.parametrize("name", ["tp2 sp", "pp2", "dp2"])
def test_every_layout_with_experts(name, world):
    """Each token takes all of them: rounding cannot choose."""
    case = draw_case(world, 2, moe_router_topk=4, **EXPERTS)
    (whole,) = run_ranks(kept_inputs, 1, case)
    world_size, sizes, changes = LAYOUTS[name]
    fields = case.fields | changes | {
        "tensor_model_parallel_size": sizes.tensor, "pipeline_model_parallel_size": sizes.pipeline,
    }  # fmt: skip
    for found in run_ranks(kept_inputs, world_size, changed(case, fields=fields, limit=ROOM), sizes=sizes):
        assert_same(found, whole, case, fields)
        assert_nothing_below_ran(found, case)
