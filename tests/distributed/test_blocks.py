"""Blocks, parts and heads alone under tensor, sequence, pipeline, context and data parallelism, against one rank."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ext.blocks.importance import BiasProbe
from megatron_ext.blocks.places import ModelPlace
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.block_scenarios import BlockCase, blocks
from tests.distributed.sharding import full_name, shard
from tests.engine_cases import relative_error
from tests.gpt_cases import LATENT, make_rollout, small_config
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

BOUND = 1e-5
LAYERS, VOCAB = 4, 61
HEADS, GROUPS, HIDDEN, DIM = 8, 2, 32, 8  # of small_config
# Of two tensor-parallel ranks one has heads 5 and 6, and both have one of 1 and 6.
TRAINED = [
    0, 2, {"block": 2, "heads": [5, 6]},
    [{"block": 1, "part": "attention"}, {"block": 3, "heads": [1, 6]}, {"block": 3, "part": "mlp"}],
]  # fmt: skip
LENGTHS = [(11, [2, 7, 7]), (1, [1, 3]), (6, [0, 5]), (3, [9])]
LAYOUTS = {
    "tp2": (ParallelSizes(tensor=2), {}),
    "pp2": (ParallelSizes(pipeline=2), {}),
    "pp4 selective recompute": (ParallelSizes(pipeline=4), {"activations_checkpoint_granularity": "selective"}),
    "tp2 pp2 sp": (ParallelSizes(tensor=2, pipeline=2), {"sequence_parallel": True}),
    "cp2 pp2": (ParallelSizes(context=2, pipeline=2), {}),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    rng, clear = fresh_generator(), False
    while not clear:  # rounding may decide whether a ratio is clipped
        case = draw_case(rng, tmp_path_factory.mktemp("deltas"))
        (result,) = run_ranks(blocks, 1, case)
        clear = all(run["clear"] for run in result["trained"])
    case.weights = result["weights"]
    return case, result


def draw_case(rng: torch.Generator, folder: Path) -> BlockCase:
    def tokens(n: int) -> list[int]:
        return torch.randint(VOCAB, (n,), generator=rng).tolist()

    swapped = []
    for n in (5, 9, 3, 7, 11):
        a = tokens(n)
        swapped.append((a, [a[0], (a[1] + 7) % VOCAB, *a[2:]]))
    prompts = [tokens(int(torch.randint(1, 14, (), generator=rng))) for _ in range(23)]
    return BlockCase(
        {"num_layers": LAYERS},
        int(torch.randint(2**31, (), generator=rng)),
        make_rollout(rng, LENGTHS, VOCAB),
        [[0, 2], [1], [3]],
        BiasProbe(prompts, swapped, (3, 8), stream_tokens=64, prompts_per_gradient=8),
        TRAINED,
        folder,
    )


def trained_part(name: str, whole: Tensor, places: tuple[ModelPlace, ...]) -> Tensor:
    """Of a parameter of the whole model, bool: which numbers lie in the places."""
    found = torch.zeros(whole.shape, dtype=torch.bool)
    for place in (p for p in places if f"layers.{p.block}." in name):
        in_attention = "self_attention." in name or "input_layernorm." in name
        if not place.heads:
            found |= place.part is None or in_attention == (place.part == "attention")
        for head in place.heads:
            if "linear_qkv" in name:  # four queries, a key and a value for each of two groups
                found.view(GROUPS, HEADS // GROUPS + 2, DIM, -1)[divmod(head, HEADS // GROUPS)] = True
            elif "linear_proj" in name:
                found.view(HIDDEN, HEADS, DIM)[:, head] = True
    return found


def places_numel(weights: dict[str, Tensor], places: tuple[ModelPlace, ...]) -> int:
    return sum(int(trained_part(name, w, places).sum()) for name, w in weights.items())


def test_only_the_places_cost_and_change(one_rank):
    """Bitwise the same outside; buffers and optimizer state of the places, and no graph below them."""
    case, result = one_rank
    for run in result["trained"]:
        places, numel = run["places"], places_numel(case.weights, run["places"])
        assert {name.split(".")[2] for name in run["names"]} == {str(place.block) for place in places}
        for name, value in run["parameters"].items():
            trained = trained_part(name, value, places)
            assert torch.equal(value[~trained], case.weights[name][~trained]), name
            assert (value != case.weights[name])[trained].float().mean() > 0.9 or not trained.any(), name
        # The distributed optimizer pads its buffer to a multiple of 128 numbers or so.
        assert numel <= run["gradient_numel"] <= numel + 512
        assert run["gradient_bytes"] == 4 * run["gradient_numel"]
        assert run["state_bytes"] == state_bytes(numel, len(run["names"]))
        lowest = min(place.block for place in places)
        assert run["graph"] == [(b, b > lowest, b >= lowest) for b in range(LAYERS)]
        assert run["losses"][0]["loss"] != run["losses"][1]["loss"]


def state_bytes(numel: int, tensors: int) -> dict[str, int]:
    """Adam's two moments in fp32, and torch's own count of steps for each tensor."""
    return {"exp_avg": 4 * numel, "exp_avg_sq": 4 * numel, "step": 4 * tensors}


def test_in_bf16_the_places_have_master_weights(one_rank, tmp_path):
    """Bytes of the optimizer's own tensors: fp32 copies and moments of what trains, and nothing of the others."""
    case, _ = one_rank
    seed = int(torch.randint(2**31, (), generator=fresh_generator()))
    fields = case.fields | {"precision": "bf16"}
    here = BlockCase(**{**vars(case), "fields": fields, "weights": seed, "trained": TRAINED[1:3], "folder": tmp_path})
    (found,) = run_ranks(blocks, 1, here)
    assert all(w.dtype == torch.bfloat16 for w in found["weights"].values())
    for run in found["trained"]:
        numel = places_numel(found["weights"], run["places"])
        assert run["state_bytes"] == state_bytes(numel, len(run["names"])) | {"master weights": 4 * numel}
        assert numel <= run["gradient_numel"] <= numel + 512 and run["gradient_bytes"] == 4 * run["gradient_numel"]


def test_a_delta_is_what_was_trained(one_rank):
    case, result = one_rank
    for run in result["trained"]:
        assert run["chosen"] == run["places"]
        assert all(torch.equal(run["patched"][name], value) for name, value in run["parameters"].items())
        assert sum(w.numel() for w in run["whole"].values()) == places_numel(case.weights, run["places"])


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, one_rank):
    sizes, changes = LAYOUTS[request.param]
    case, expected = one_rank
    fields = case.fields | changes | {
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "context_parallel_size": sizes.context,
    }  # fmt: skip
    here = BlockCase(**{**vars(case), "fields": fields})
    ranks = run_ranks(blocks, sizes.tensor * sizes.pipeline * sizes.context, here, sizes=sizes)
    return small_config(**fields), case, expected, ranks


def test_same_rankings_as_one_rank(layout):
    _, _, expected, ranks = layout
    assert_same_rankings(ranks, expected)


def assert_same_rankings(ranks: list[dict], expected: dict) -> None:
    for rank in ranks:
        assert rank["rankings"].keys() == expected["rankings"].keys()
        for name, ranking in rank["rankings"].items():
            truth = expected["rankings"][name]
            assert relative_error(torch.tensor(ranking.scores), torch.tensor(truth.scores)) <= BOUND, name
            if ranking.grain == "blocks":  # of many heads two may score alike to the last digits
                assert sorted(ranking.order) == sorted(truth.order), name
                # Of two blocks either may be the first that score alike to rounding.
                scores = [truth.scores[place] for place in ranking.order]
                assert max(b - a for a, b in pairwise(scores)) <= BOUND * max(map(abs, scores)), name


@pytest.mark.parametrize(
    ("world_size", "sizes", "changes"),
    [(2, ParallelSizes(), {}), (4, ParallelSizes(tensor=2), {"sequence_parallel": True})],
    ids=["dp2", "tp2 sp dp2"],
)
def test_data_parallel_ranks_share_the_prompts(world_size, sizes, changes, one_rank):
    """Odd numbers of prompts and of pairs: one rank has one more."""
    case, expected = one_rank
    assert len(case.probe.prompts) % 2 and len(case.probe.swapped) % 2
    fields = case.fields | changes | {"tensor_model_parallel_size": sizes.tensor}
    here = BlockCase(**{**vars(case), "fields": fields, "trained": []})
    assert_same_rankings(run_ranks(blocks, world_size, here, sizes=sizes), expected)


def test_latent_attention_is_ranked_as_on_one_rank(one_rank):
    """Its norms see all rows on every tensor-parallel rank, and not some heads: their gradients are not summed."""
    seed = int(torch.randint(2**31, (), generator=fresh_generator()))
    case = BlockCase(**{**vars(one_rank[0]), "fields": {"num_layers": LAYERS} | LATENT, "weights": seed, "trained": []})
    (alone,) = run_ranks(blocks, 1, case)
    here = BlockCase(
        **{**vars(case), "fields": case.fields | {"tensor_model_parallel_size": 2}, "weights": alone["weights"]}
    )
    assert_same_rankings(run_ranks(blocks, 2, here, sizes=ParallelSizes(tensor=2)), alone)


def test_same_training_as_one_rank(layout):
    """Losses and what trains; bitwise nothing else; and one rank's delta lands on every layout."""
    config, case, expected, ranks = layout
    for number, truth in enumerate(expected["trained"]):
        for rank in ranks:
            run, (tp_rank, stage) = rank["trained"][number], rank["ranks"]
            assert (run["places"], run["name"], run["chosen"]) == (truth["places"], truth["name"], truth["places"])
            for step, losses in enumerate(run["losses"]):
                for key, value in losses.items():
                    assert value == pytest.approx(truth["losses"][step][key], rel=BOUND, abs=BOUND), key
            for name, value in run["parameters"].items():
                full = full_name(name, config, stage)
                inside = trained_part(full, case.weights[full], truth["places"])
                trained, before, inside = (
                    shard(full, x, config, tp_rank) for x in (truth["parameters"][full], case.weights[full], inside)
                )
                assert torch.equal(value[~inside], before[~inside]), full
                assert not inside.any() or relative_error(value, trained) <= BOUND, full
                assert torch.equal(run["patched"][name], trained), full


def test_stages_below_run_no_backward(layout):
    """No graph below the places, whatever stages they are on; stages without one hold neither buffers nor state."""
    config, case, expected, ranks = layout
    per_stage = LAYERS // config.pipeline_model_parallel_size
    for number, truth in enumerate(expected["trained"]):
        numbers, state = {place.block for place in truth["places"]}, 0
        for rank in ranks:
            run, (_, stage) = rank["trained"][number], rank["ranks"]
            mine = range(stage * per_stage, (stage + 1) * per_stage)
            assert run["graph"] == [(b, b > min(numbers), b >= min(numbers)) for b in mine]
            assert bool(run["names"]) == bool(numbers & set(mine))
            moments = run["state_bytes"]["exp_avg"] + run["state_bytes"]["exp_avg_sq"]
            assert not moments or run["names"] and run["gradient_numel"]
            state += moments
        replicas = config.context_parallel_size if truth["name"] == "adam" else 1
        norms = {name: w for name, w in case.weights.items() if "layernorm" in name}  # which every rank holds
        duplicates = (config.tensor_model_parallel_size - 1) * places_numel(norms, truth["places"])
        assert state == replicas * 8 * (places_numel(case.weights, truth["places"]) + duplicates)
