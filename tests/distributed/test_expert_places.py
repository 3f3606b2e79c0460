"""Places of a model with experts: what a delta holds of them, and how they are ranked, wherever the experts are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.blocks.delta import read_delta
from megatron_ext.models import build_gpt
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.block_scenarios import ExpertDeltaCase, delta_of_experts, rankings_of_experts
from tests.distributed.sharding import full_name, shard
from tests.engine_cases import relative_error
from tests.gpt_cases import randomize, small_config
from tests.harness import run_ranks
from tests.importance_cases import draw_probe

pytestmark = pytest.mark.distributed

BOUND = 1e-4  # logits are told in fp32, and rounded either way where layouts differ in the last digit
HEADS = {"num_attention_heads": 16, "num_query_groups": 4}
EXPERTS = HEADS | {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}
# The first block has an MLP, the second everything that a layer with experts may have.
MIXED = EXPERTS | {
    "moe_layer_freq": [0, 1], "moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True,
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
}  # fmt: skip
WITH_BIASES = EXPERTS | {"add_bias_linear": True}
PLACES = [1, [0, {"block": 1, "part": "mlp"}], [{"block": 0, "part": "mlp"}, {"block": 1, "part": "attention"}]]
IN_TWO = ParallelSizes(tensor=2, expert=2, expert_tensor=1)
LAYOUTS = {
    "tp2": (2, ParallelSizes(tensor=2), MIXED),
    "pp2": (2, ParallelSizes(pipeline=2), MIXED),
    "ep2": (2, ParallelSizes(expert=2), MIXED),
    "tp2 ep2": (4, ParallelSizes(tensor=2, expert=2), MIXED),
    "tp2 ep2, whole experts": (2, IN_TWO, MIXED),
    "ep2, each in two parts": (4, ParallelSizes(expert=2, expert_tensor=2), MIXED),
    "pp2 ep2": (4, ParallelSizes(pipeline=2, expert=2), MIXED),
    "ep2, experts with biases": (2, ParallelSizes(expert=2), WITH_BIASES),
    "tp2 ep2, whole experts with biases": (2, IN_TWO, WITH_BIASES),
}


def spread(fields: dict[str, Any], sizes: ParallelSizes) -> dict[str, Any]:
    """The model's fields with those of a layout."""
    return fields | {
        "tensor_model_parallel_size": sizes.tensor, "pipeline_model_parallel_size": sizes.pipeline,
        "sequence_parallel": sizes.tensor > 1, "expert_model_parallel_size": sizes.expert,
        "expert_tensor_parallel_size": sizes.expert_tensor,
    }  # fmt: skip


def draw_weights(world: torch.device, fields: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
    model = build_gpt(small_config(**fields), world)
    randomize(model, rng)
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    biases = [name for name, _ in model.named_buffers() if name.endswith("expert_bias")]
    return found | {name: 0.2 * torch.randn(fields["num_moe_experts"], generator=rng) for name in biases}


class Alone:
    """What one rank has, and writes."""

    def __init__(self, world: torch.device, fields: dict[str, Any], folder: Path):
        rng = fresh_generator()
        weights, trained = (draw_weights(world, fields, rng) for _ in range(2))
        self.case = ExpertDeltaCase(fields, weights, trained, PLACES, folder, folder)
        (self.result,) = run_ranks(delta_of_experts, 1, self.case)


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    found: dict[str, Alone] = {}

    def of(fields: dict[str, Any]) -> Alone:
        return found.setdefault(str(fields), Alone(world, fields, tmp_path_factory.mktemp("alone")))

    return of


def lies_in(name: str, spec: Any) -> bool:
    """Whether a parameter of the whole model lies in places."""
    places = [{"block": one} if isinstance(one, int) else one for one in (spec if isinstance(spec, list) else [spec])]
    part = "mlp" if re.search(r"\.(pre_mlp_layernorm|mlp)\.", name) else "attention"
    return any(f"layers.{place['block']}." in name and place.get("part", part) == part for place in places)


def saved_name(name: str, weights: dict[str, Tensor]) -> str:
    """As a delta has it: norms before a linear by the names that Transformer Engine's fused ones have."""
    layer = re.match(r"decoder\.layers\.\d+\.", name)[0]
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    if f"{layer}mlp.router.weight" in weights:
        return name
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


@pytest.mark.parametrize("fields", [MIXED, WITH_BIASES], ids=["all but biases", "biases"])
def test_a_delta_has_every_expert_by_its_number(fields, alone):
    found, case = alone(fields).result, alone(fields).case
    for (whole, patched), spec in zip(found["deltas"], PLACES, strict=True):
        inside = {name for name in case.trained if lies_in(name, spec)}
        expected = {saved_name(name, case.trained): case.trained[name] for name in inside}
        assert whole.keys() == expected.keys()
        assert all(torch.equal(whole[name], value) for name, value in expected.items())
        numbers = {int(m[1]) for name in whole if (m := re.search(r"layers\.1\.mlp\..*local_experts\.(\d+)\.", name))}
        assert numbers == (
            set(range(4)) if any(lies_in(n, spec) for n in case.weights if "layers.1.mlp" in n) else set()
        )
        for name, value in patched.items():
            assert torch.equal(value, (case.trained if name in inside else case.weights)[name]), name
    biased = any(name.endswith("mlp.router.expert_bias") for name in found["deltas"][0][0])
    assert biased == fields.get("moe_router_enable_expert_bias", False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_delta_is_the_same_wherever_the_experts_are(name, alone, tmp_path):
    """Each layout writes one rank's delta, bitwise, and takes one rank's."""
    ranks, sizes, fields = LAYOUTS[name]
    expected, given = alone(fields).result, alone(fields).case
    case = ExpertDeltaCase(
        spread(fields, sizes), given.weights, given.trained, PLACES, written=tmp_path, applied=given.written
    )
    config = small_config(**case.fields)
    results = run_ranks(delta_of_experts, ranks, case, sizes=sizes)
    for number, spec in enumerate(PLACES):
        described, tensors = read_delta(tmp_path / f"{number}.safetensors")
        truth_described, truth = read_delta(given.written / f"{number}.safetensors")
        assert described == truth_described and tensors.keys() == truth.keys()
        for result in results:
            (whole, patched), (rank, stage), (expert, part) = (
                result["deltas"][number],
                result["ranks"],
                result["experts"],
            )
            assert whole.keys() == truth.keys()
            assert all(torch.equal(whole[key], value) for key, value in expected["deltas"][number][0].items())
            for mine, value in patched.items():
                full = full_name(mine, config, stage, expert)
                weights = given.trained if lies_in(full, spec) else given.weights
                assert torch.equal(value, shard(full, weights[full], config, rank, part)), full


@pytest.mark.parametrize(("ranks", "sizes"), [(2, ParallelSizes(tensor=2)), (2, ParallelSizes(pipeline=2)), (2, ParallelSizes())],
                         ids=["tp2", "pp2", "dp2"])  # fmt: skip
def test_places_are_ranked_as_on_one_rank(ranks, sizes, alone):
    case, probe = alone(MIXED).case, draw_probe(fresh_generator(), stream_tokens=64, prompts_per_gradient=8)
    (expected,) = run_ranks(rankings_of_experts, 1, MIXED, case.weights, probe)
    for result in run_ranks(rankings_of_experts, ranks, spread(MIXED, sizes), case.weights, probe, sizes=sizes):
        assert result.keys() == expected.keys()
        for name, ranking in result.items():
            truth = torch.tensor(expected[name].scores)
            assert relative_error(torch.tensor(ranking.scores), truth) <= BOUND, name
            assert truth.min() > 0 or name in ("last", "random"), name
