"""A run that goes on from a checkpoint is the run that was never stopped: bitwise on the same layout, to rounding on others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ext.models import build_gpt
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.resume_scenarios import ResumeCase, refused, resume
from tests.distributed.sharding import full_name, shard
from tests.engine_cases import relative_error
from tests.gpt_cases import make_rollout, randomize, small_config
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

BOUND = 1e-5
LAYERS, VOCAB = 4, 61
# Two groups for each microbatch, as many microbatches as data-parallel ranks at least.
LENGTHS = [(11, [2, 7, 7]), (5, [4, 3]), (6, [3, 5]), (3, [9])]
KINDS = {
    "adam": ("adam", None),
    "distributed": ("distributed_fused_adam", None),
    "one block": ("distributed_fused_adam", 2),
    "heads": ("distributed_fused_adam", {"block": 2, "heads": [1, 2]}),  # of the first of two tensor-parallel ranks
}
# Saved under the first, gone on with under the second, optimizers included.
MOVES = {
    "tp2 to pp2 uneven": (
        ParallelSizes(tensor=2), ParallelSizes(pipeline=2), {"num_layers_in_last_pipeline_stage": 3},
    ),
    "tp1 to pp2 in pieces": (ParallelSizes(), ParallelSizes(pipeline=2), {"virtual_pipeline_model_parallel_size": 2}),
    "tp1 to tp2 sp": (ParallelSizes(), ParallelSizes(tensor=2), {"sequence_parallel": True}),
    "dp1 to dp2": (ParallelSizes(), (ParallelSizes(), 2), {}),
    "tp2 to cp2": (ParallelSizes(tensor=2), ParallelSizes(context=2), {}),
}  # fmt: skip


def fields(sizes: ParallelSizes, changes: dict) -> dict:
    return {"num_layers": LAYERS, **sizes.named, **changes}


def split(layout) -> tuple[ParallelSizes, int]:
    """(sizes, ranks)."""
    sizes, data = layout if isinstance(layout, tuple) else (layout, 1)
    return sizes, sizes.tensor * sizes.pipeline * sizes.context * data


@pytest.fixture(scope="module")
def start(world):
    rng, clear = fresh_generator(), False
    model = build_gpt(small_config(num_layers=LAYERS), world)
    while not clear:  # rounding may decide whether a ratio is clipped
        randomize(model, rng)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = weights, make_rollout(rng, LENGTHS, VOCAB)
        clear = all(result["clear"] for result in resume(world, cases(found, ParallelSizes(), {})))
    return found


def cases(start, layout, changes, **more) -> list[ResumeCase]:
    weights, rollout = start
    cuts = [[0, 1], [2, 3]]
    return [
        ResumeCase(fields(layout, changes), weights, rollout, cuts, optimizer, place, (3, 2), **more)
        for optimizer, place in KINDS.values()
    ]


@pytest.fixture(scope="module", params=MOVES)
def moved(request, start, tmp_path_factory):
    """Of each kind: the run that was never stopped, gone on with under its own layout, and under the other."""
    first, second, changes = MOVES[request.param]
    folder = tmp_path_factory.mktemp("checkpoints")
    (sizes, ranks), (other, more_ranks) = split(first), split(second)
    saving = [replace(c, save=folder / str(i)) for i, c in enumerate(cases(start, sizes, {}))]
    going_on = [replace(c, save=None, load=folder / str(i)) for i, c in enumerate(saving)]
    straight = run_ranks(resume, ranks, saving, sizes=sizes)
    again = run_ranks(resume, ranks, going_on, sizes=sizes)
    moving = [
        replace(c, fields=fields(other, changes))
        for c in going_on
        if c.place is None or "virtual_pipeline_model_parallel_size" not in changes  # refused
    ]
    elsewhere = run_ranks(resume, more_ranks, moving, sizes=other)
    return small_config(**fields(sizes, {})), small_config(**fields(other, changes)), straight, again, elsewhere


def test_same_layout_bitwise(moved):
    _, _, straight, again, _ = moved
    for a, b in zip(straight, again, strict=True):
        for kind, x, y in zip(KINDS, a, b, strict=True):
            assert x["losses"] == y["losses"], kind
            assert all(torch.equal(y["parameters"][name], value) for name, value in x["parameters"].items()), kind


def test_another_layout(moved, start):
    config, other, straight, _, elsewhere = moved
    whole = [_whole([rank[number] for rank in straight], config) for number in range(len(KINDS))]
    for rank in elsewhere:
        assert len(rank) >= 2  # what trains alone is not for all layouts
        for kind, found, expected, before in zip(KINDS, rank, whole, straight[0], strict=False):
            tp_rank, stage = found["ranks"]
            for step, losses in enumerate(found["losses"]):
                for key, value in losses.items():
                    assert value == pytest.approx(before["losses"][step][key], rel=BOUND, abs=BOUND), (kind, key)
            for name, value in found["parameters"].items():
                full = full_name(name, other, stage)
                # Against the weights' own size: a step is small beside them.
                assert relative_error(value, shard(full, expected[full], other, tp_rank)) <= BOUND, (kind, full)
                moved_by = relative_error(value, shard(full, start[0][full], other, tp_rank))
                if kind == "heads":
                    inside = "layers.2." in full and ("linear_qkv" in full or "linear_proj" in full)
                    assert inside or moved_by == 0, full
                else:
                    assert (moved_by > 10 * BOUND) == (kind != "one block" or "layers.2." in full), (kind, full)


@pytest.mark.parametrize("hurt", [0, 1])
def test_a_disk_that_refuses_one_rank_is_one_line_on_all(hurt, tmp_path):
    for rank in run_ranks(refused, 2, tmp_path, hurt, sizes=ParallelSizes(tensor=2)):
        assert len(rank) == 2
        assert all(
            "could not be written (" in line and line.endswith("untouched") and "\n" not in line for line in rank
        )
    assert not (tmp_path / "checkpoint").exists()


def _whole(ranks: list[dict], config) -> dict[str, torch.Tensor]:
    """Whole parameters from the shards of all ranks: each place is filled by the rank whose shard it is."""
    full: dict[str, torch.Tensor] = {}
    tp = config.tensor_model_parallel_size
    found: dict[str, dict[int, torch.Tensor]] = {}
    for rank in ranks:
        tp_rank, stage = rank["ranks"]
        for name, value in rank["parameters"].items():
            found.setdefault(full_name(name, config, stage), {})[tp_rank] = value
    for name, parts in found.items():
        if tp == 1 or parts[0].shape == parts[1].shape and torch.equal(parts[0], parts[1]):
            full[name] = parts[0]
        else:
            full[name] = _join(name, parts, config)
    return full


def _join(name: str, parts: dict[int, torch.Tensor], config) -> torch.Tensor:
    """The inverse of `shard`: found by sharding numbered places."""
    shape = list(parts[0].shape)
    dim = 1 if "linear_proj" in name or "linear_fc2" in name else 0
    shape[dim] *= config.tensor_model_parallel_size
    places = torch.arange(torch.tensor(shape).prod()).view(shape)
    full = torch.empty(shape)
    for rank, part in parts.items():
        full.view(-1)[shard(name, places, config, rank).reshape(-1)] = part.reshape(-1)
    return full
