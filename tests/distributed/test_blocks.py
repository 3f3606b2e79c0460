"""One block at a time under tensor, sequence, pipeline, context and data parallelism, against one rank."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_ext.blocks.importance import BiasProbe
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.block_scenarios import BlockCase, blocks
from tests.distributed.sharding import full_name, shard
from tests.engine_cases import relative_error
from tests.gpt_cases import make_rollout, small_config
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

BOUND = 1e-5
LAYERS, VOCAB = 4, 61
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
    rng = fresh_generator()

    def tokens(n: int) -> list[int]:
        return torch.randint(VOCAB, (n,), generator=rng).tolist()

    swapped = []
    for n in (5, 9, 3, 7, 11):
        a = tokens(n)
        swapped.append((a, [a[0], (a[1] + 7) % VOCAB, *a[2:]]))
    prompts = [tokens(int(torch.randint(1, 14, (), generator=rng))) for _ in range(23)]
    case = BlockCase(
        {"num_layers": LAYERS},
        int(torch.randint(2**31, (), generator=rng)),
        make_rollout(rng, LENGTHS, VOCAB),
        [[0, 2], [1], [3]],
        BiasProbe(prompts, swapped, (3, 8), stream_tokens=64, prompts_per_gradient=8),
        [0, 2, 3],
        tmp_path_factory.mktemp("deltas"),
    )
    (result,) = run_ranks(blocks, 1, case)
    case.weights = result["weights"]
    return case, result


def in_block(name: str, block: int) -> bool:
    return f"layers.{block}." in name


def block_numel(weights: dict[str, torch.Tensor], block: int) -> int:
    return sum(w.numel() for name, w in weights.items() if in_block(name, block))


def test_only_the_block_costs_and_changes(one_rank):
    """Bitwise the same outside; buffers and optimizer state of one block, and no graph below it."""
    case, result = one_rank
    for run in result["trained"]:
        block, numel = run["block"], block_numel(case.weights, run["block"])
        assert run["names"] and all(in_block(name, block) for name in run["names"])
        for name, value in run["parameters"].items():
            assert torch.equal(value, case.weights[name]) == (not in_block(name, block)), name
        # The distributed optimizer pads its buffer to a multiple of 128 numbers or so.
        assert numel <= run["gradient_numel"] <= numel + 512
        assert run["gradient_bytes"] == 4 * run["gradient_numel"]
        assert run["state_bytes"] == state_bytes(numel, len(run["names"]))
        assert run["graph"] == [(b, b > block, b >= block) for b in range(LAYERS)]
        assert run["losses"][0]["loss"] != run["losses"][1]["loss"]


def state_bytes(numel: int, tensors: int) -> dict[str, int]:
    """Adam's two moments in fp32, and torch's own count of steps for each tensor."""
    return {"exp_avg": 4 * numel, "exp_avg_sq": 4 * numel, "step": 4 * tensors}


def test_in_bf16_one_block_has_master_weights(one_rank, tmp_path):
    """Bytes of the optimizer's own tensors: fp32 copies and moments of the block's weights, and nothing of the others."""
    case, _ = one_rank
    seed = int(torch.randint(2**31, (), generator=fresh_generator()))
    fields = case.fields | {"precision": "bf16"}
    here = BlockCase(**{**vars(case), "fields": fields, "weights": seed, "trained": [2], "folder": tmp_path})
    (found,) = run_ranks(blocks, 1, here)
    numel = block_numel(found["weights"], 2)
    assert all(w.dtype == torch.bfloat16 for w in found["weights"].values())
    for run in found["trained"]:
        assert run["state_bytes"] == state_bytes(numel, len(run["names"])) | {"master weights": 4 * numel}
        assert numel <= run["gradient_numel"] <= numel + 512 and run["gradient_bytes"] == 4 * run["gradient_numel"]


def test_a_delta_is_the_trained_block(one_rank):
    _, result = one_rank
    for run in result["trained"]:
        assert run["chosen"] == run["block"]
        assert all(torch.equal(run["patched"][name], value) for name, value in run["parameters"].items())


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
            assert ranking.order == truth.order, name


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


def test_same_training_as_one_rank(layout):
    """Losses and the trained block; bitwise nothing else; and one rank's delta lands on every layout."""
    config, case, expected, ranks = layout
    for number, truth in enumerate(expected["trained"]):
        for rank in ranks:
            run, (tp_rank, stage) = rank["trained"][number], rank["ranks"]
            assert (run["block"], run["name"], run["chosen"]) == (truth["block"], truth["name"], truth["block"])
            for step, losses in enumerate(run["losses"]):
                for key, value in losses.items():
                    assert value == pytest.approx(truth["losses"][step][key], rel=BOUND, abs=BOUND), key
            for name, value in run["parameters"].items():
                full = full_name(name, config, stage)
                trained = shard(full, truth["parameters"][full], config, tp_rank)
                if in_block(full, truth["block"]):
                    assert relative_error(value, trained) <= BOUND, full
                else:
                    assert torch.equal(value, shard(full, case.weights[full], config, tp_rank)), full
                assert torch.equal(run["patched"][name], trained), full


def test_stages_below_run_no_backward(layout):
    """No graph below the block, whatever stage it is on; stages without it hold neither buffers nor state."""
    config, case, expected, ranks = layout
    per_stage = LAYERS // config.pipeline_model_parallel_size
    for number, truth in enumerate(expected["trained"]):
        block, state = truth["block"], 0
        for rank in ranks:
            run, (_, stage) = rank["trained"][number], rank["ranks"]
            mine = range(stage * per_stage, (stage + 1) * per_stage)
            assert run["graph"] == [(b, b > block, b >= block) for b in mine]
            assert bool(run["names"]) == bool(run["state_bytes"]) == bool(run["gradient_numel"]) == (block in mine)
            state += run["state_bytes"]["exp_avg"] + run["state_bytes"]["exp_avg_sq"]
        replicas = config.context_parallel_size if truth["name"] == "adam" else 1
        duplicates = (config.tensor_model_parallel_size - 1) * _replicated(case, config, block)
        assert state == replicas * 8 * (block_numel(case.weights, block) + duplicates)


def _replicated(case: BlockCase, config, block: int) -> int:
    """Numbers of a block that every tensor-parallel rank holds: its norms."""
    names = [n for n in case.weights if in_block(n, block) and re.search("layernorm", n)]
    return sum(case.weights[n].numel() for n in names)
