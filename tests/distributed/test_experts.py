"""Experts over ranks: sums of gradients, steps, what balances them, checkpoints that move between numbers of ranks; routes that
are replayed, in groups, trees and over context-parallel ranks."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.grouping.routes import UNKNOWN, RouteShape
from megatron_ext.models import GPTModelConfig, build_gpt
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.data_scenarios import DataCase
from tests.distributed.expert_scenarios import OPTIMIZERS, gone_on_twice, replayed, spread
from tests.distributed.resume_scenarios import ResumeCase, resume
from tests.distributed.sharding import full_name, shard
from tests.engine_cases import edges_of, gradient_floor, relative_error
from tests.gpt_cases import make_rollout, randomize, small_config
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

BOUND = 1e-5
MODEL = {
    "num_attention_heads": 16, "num_query_groups": 4, "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16,
    "moe_aux_loss_coeff": 0.1,
}  # fmt: skip
PLAIN = MODEL | {"moe_aux_loss_coeff": 0.0}
MOVED = MODEL | {
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01,
    "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
APART = {"expert_model_parallel_size": 2}
LENGTHS = [(21, [9, 13, 4]), (2, [1, 3]), (6, [0, 5]), (3, [2]), (4, [3, 2])]
LAYERS, TOPK, EXPERTS = 2, MODEL["moe_router_topk"], MODEL["num_moe_experts"]


class Start:
    """Weights, and a batch."""

    def __init__(self, device: torch.device):
        rng = fresh_generator()
        self.rollout = make_rollout(rng, LENGTHS, 61)
        self.trees = make_rollout(rng, LENGTHS, 61, common=3)
        self.device, self.rng = device, rng
        self.weights, self.others, self.moved = map(self.draw, (MODEL, MODEL, MOVED))

    def draw(self, fields: dict) -> dict[str, torch.Tensor]:
        """Weights by which no token of the batch takes experts by a hair, or is clipped by one."""
        model, clear = build_gpt(small_config(**fields), self.device), False
        biases = {name: b for name, b in model.named_buffers() if name.endswith("expert_bias")}
        while not clear:
            randomize(model, self.rng)
            for bias in biases.values():
                bias.copy_(0.3 * torch.randn(len(bias), generator=self.rng))
            clear = all(edges_of(model, rollout).clear for rollout in (self.rollout, self.trees))
        return {name: p.detach().clone() for name, p in (*model.named_parameters(), *biases.items())}


@pytest.fixture(scope="module")
def start(world) -> Start:
    return Start(world)


@pytest.fixture(scope="module")
def one(start) -> dict:
    """What a rank does alone. The auxiliary loss depends on the cut, so that it is left out."""
    return run_ranks(spread, 1, DataCase(PLAIN, start.weights, start.rollout, [[[0, 1, 2, 3, 4]]]))[0]


@pytest.mark.parametrize(
    ("parts", "cuts"),
    [(1, [[[0]], [[1], [2, 3], [4]]]), (2, [[[0]], [[1], [2]], [[3]], [[4]]])],
    ids=["ep2", "ep2, each cut in two"],
)
def test_a_batch_over_ranks_that_share_experts_is_one_ranks(parts, cuts, start, one):
    """Of unequal numbers of streams, which all run equally many: also those that have other parts of the same experts."""
    fields = PLAIN | APART | {"expert_tensor_parallel_size": parts}
    sizes = ParallelSizes(expert=2, expert_tensor=parts)
    ranks = run_ranks(spread, len(cuts), DataCase(fields, start.weights, start.rollout, cuts), sizes=sizes)
    assert_one_ranks(ranks, small_config(**fields), one)


def assert_one_ranks(ranks: list[dict], config: GPTModelConfig, one: dict) -> None:
    """Gradients, what is reported, and what a step makes of weights and biases."""
    floor = gradient_floor(one["gradients"]["gradients"])
    for result in ranks:
        expert, part = result["experts"]

        def whole(name: str, of: dict, result: dict = result, expert: int = expert, part: int = part) -> torch.Tensor:
            full = full_name(name, config, result["stage"], expert)
            return shard(full, of[full], config, result["rank"], part)

        for name, value in result["gradients"]["gradients"].items():
            assert relative_error(value, whole(name, one["gradients"]["gradients"]), floor) <= BOUND, name
        for optimizer in OPTIMIZERS:
            found, expected = result["steps"][optimizer], one["steps"][optimizer]
            ours, megatrons = found["norms"]
            assert ours == pytest.approx(megatrons, rel=1e-6) and found["refused"]
            assert found["report"] == pytest.approx(expected["report"], rel=BOUND)
            for name, value in found["stepped"].items():
                assert (value - whole(name, expected["stepped"])).abs().max() <= BOUND, name
                assert torch.equal(found["after refusal"][name], value), name
            for name, bias in found["biases"].items():
                assert torch.equal(bias, whole(name, expected["biases"])), name


BALANCED = {
    "ep2": (ParallelSizes(expert=2), 2),
    "tp2": (ParallelSizes(tensor=2), 2),
    "tp2 ep2": (ParallelSizes(tensor=2, expert=2, expert_tensor=1), 2),
    "ep2 cp2": (ParallelSizes(context=2, expert=2), 2),
    "pp2": (ParallelSizes(pipeline=2), 2),
    "pp2 cp2 ep2": (ParallelSizes(pipeline=2, context=2, expert=2), 4),
}


@pytest.fixture(scope="module")
def balanced(start) -> dict:
    """Of each way to balance, what a rank does alone with two streams."""
    cases = {"loss": (MODEL, start.weights), "loss and biases": (MOVED, start.moved)}
    streams = [[[0, 1], [2, 3, 4]]]
    return {
        name: (fields, weights, run_ranks(spread, 1, DataCase(fields, weights, start.rollout, streams))[0])
        for name, (fields, weights) in cases.items()
    }


@pytest.mark.parametrize("layout", BALANCED)
def test_what_balances_experts_is_one_ranks(layout, start, balanced):
    """The auxiliary loss and its gradient, how biases move, and the load that is told."""
    sizes, world = BALANCED[layout]
    streams = [[[0, 1]], [[2, 3, 4]]] if layout == "ep2" else [[[0, 1], [2, 3, 4]]]
    layout_fields = {
        "tensor_model_parallel_size": sizes.tensor, "sequence_parallel": sizes.tensor > 1,
        "pipeline_model_parallel_size": sizes.pipeline, "context_parallel_size": sizes.context,
        "expert_model_parallel_size": sizes.expert, "expert_tensor_parallel_size": sizes.expert_tensor,
    }  # fmt: skip
    for fields, weights, one in balanced.values():
        fields = fields | layout_fields
        ranks = run_ranks(spread, world, DataCase(fields, weights, start.rollout, streams), sizes=sizes)
        assert_one_ranks(ranks, small_config(**fields), one)
        step = one["steps"]["adam"]
        assert step["report"]["balance_loss"] > 0 and step["report"]["expert_load_max"] >= 1
        moved = [torch.count_nonzero(bias - weights[name]) for name, bias in step["biases"].items()]
        assert any(moved) == ("moe_router_bias_update_rate" in fields)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)], ids=["ep1 to ep2", "ep2 to ep1"])
def test_a_run_goes_on_with_experts_on_other_ranks(first, second, start, tmp_path):
    """Weights and optimizer. The auxiliary loss is on: both ranks' streams are the same ones."""
    weights = start.weights

    def case(ranks: int, **more) -> ResumeCase:
        fields = MODEL | (APART if ranks == 2 else {})
        return ResumeCase(
            fields, weights, start.rollout, [[0, 1], [2, 3]], "distributed_fused_adam", None, (2, 2), **more
        )

    while not resume(start.device, [case(1)])[0]["clear"]:  # also of the weights of later steps
        weights = start.draw(MODEL)

    def ran(ranks: int, one: ResumeCase) -> list:
        return [r[0] for r in run_ranks(resume, ranks, [one], sizes=ParallelSizes(expert=ranks))]

    straight = ran(first, case(first, save=tmp_path / "checkpoint"))
    moved = ran(second, case(second, load=tmp_path / "checkpoint"))
    for here, there in ((s, m) for s in range(first) for m in range(second)):
        for mine, theirs in zip(straight[here]["losses"], moved[there]["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=BOUND)  # losses are of advantages that cancel
    many, single = (moved, straight[0]) if second == 2 else (straight, moved[0])
    config = small_config(**MODEL | APART)
    for expert, result in enumerate(many):
        for name, value in result["parameters"].items():
            expected = shard(name, single["parameters"][full_name(name, config, 0, expert)], config, 0)
            assert (value - expected).abs().max() <= BOUND, name


def test_a_run_that_goes_on_twice_has_the_moments_of_its_last_step(start, tmp_path):
    """Experts over ranks have an optimizer of their own beside the other's: neither keeps what is the other's."""
    case = DataCase(PLAIN | APART, start.weights, start.rollout, [[[0, 1]], [[2, 3, 4]]])
    for once, twice in run_ranks(gone_on_twice, 2, case, tmp_path, sizes=ParallelSizes(expert=2)):
        assert all(torch.equal(value, twice[name]) for name, value in once.items())


@pytest.mark.parametrize("context", [1, 2], ids=["one rank", "cp2"])
@pytest.mark.parametrize("trees", [False, True], ids=["groups", "trees"])
def test_tokens_take_the_experts_that_they_are_told(context, trees, start):
    """R2 and R3, counted; and what is scored then is neither the old policy's nor that of free routers."""
    rollout = start.trees if trees else start.rollout
    fields = MODEL | {"context_parallel_size": context, "expert_model_parallel_size": context}
    routes = []
    for prompt, response in rollout.flat:
        shape = (len(prompt) + len(response) - 1, LAYERS, TOPK)
        order = torch.rand(*shape[:2], EXPERTS, generator=start.rng).argsort(-1)[..., :TOPK]
        with io.BytesIO() as buffer:
            np.save(buffer, order.numpy().astype(np.uint8))
            text = base64.b64encode(buffer.getvalue()).decode()
        routes.append(RouteShape(LAYERS, TOPK, EXPERTS).read(text, shape[0] + 1))
    case = DataCase(fields, start.weights, rollout, [[[0, 1], [2, 3]]])
    sizes = ParallelSizes(context=context, expert=context)
    results = run_ranks(replayed, context, case, start.others, routes, sizes=sizes)
    rows = [sum(r["R2 followed"][i] for r in results) for i in range(2)]
    for number in range(2):
        table = results[0]["tables"][number]
        assert rows[number] >= LAYERS * (table[:, 0, 0] != UNKNOWN).sum() > 0
        assert rows[number] == sum(r["R3 followed"][number] for r in results)
        for result in results:
            old, free, second, third = (result[key][number] for key in ("old", "free", "R2", "R3"))
            assert all(
                (a - b).abs().max() > 1e-3 for a, b in ((old, second), (free, second), (free, third), (second, third))
            )
            assert torch.count_nonzero(result["gradient"])
    if context == 2:  # the same as on one rank
        (alone,) = run_ranks(replayed, 1, DataCase(MODEL, start.weights, rollout, case.spread), start.others, routes)
        for key in ("old", "free", "R2", "R3"):
            for result in results:
                assert all(relative_error(a, b) <= BOUND for a, b in zip(result[key], alone[key], strict=True)), key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no base64", "are no .npy file in base64"),
        (base64.b64encode(b"something").decode(), "are no .npy file in base64"),
        (np.zeros((4, LAYERS, TOPK), np.uint8), r"are uint8 \[4, 2, 2\], not integers \[5, 2, 2\]"),
        (np.zeros((5, LAYERS, TOPK)), r"are float64 \[5, 2, 2\], not integers"),
        (np.full((5, LAYERS, TOPK), EXPERTS), "name expert 4, and the model has 4"),
    ],
)
def test_routes_that_cannot_be_are_refused(text, words):
    if not isinstance(text, str):
        with io.BytesIO() as buffer:
            np.save(buffer, text)
            text = base64.b64encode(buffer.getvalue()).decode()
    with pytest.raises(UserError, match=words):
        RouteShape(LAYERS, TOPK, EXPERTS).read(text, 6)
