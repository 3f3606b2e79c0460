"""Weights that are gathered while the next pass runs are those that are gathered before it, bitwise, whoever asks for them."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.adapters import LoraConfig
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.models.media import MediaPrompt
from megatron_ext.rotary import Video
from megatron_ext.runtime.distributed import ParallelSizes
from megatron_ext.vision import VisionConfig
from tests.conftest import fresh_generator
from tests.distributed.gather_scenarios import STEPS, GatherCase, gathers
from tests.gpt_cases import LATENT
from tests.harness import run_ranks
from tests.layouts import randn

pytestmark = pytest.mark.distributed

RESPONSES = [[[1, 2, 3], [4, 5]], [[6, 7, 8, 9], [2]]]
UNTIED = {"share_embeddings_and_output_weights": False}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16, "expert_model_parallel_size": 2}
VISION = {"vision": VisionConfig(6), "position_embedding": PositionEmbedding("mrope")}
# Name -> (ranks, sizes, changes to the model, layers that do not train).
CASES = {
    "tied": (2, ParallelSizes(), {}, ()),
    "untied, bf16": (2, ParallelSizes(), UNTIED | {"precision": "bf16"}, ()),
    "full recompute": (2, ParallelSizes(), {"activations_checkpoint_granularity": "full"}, ()),
    "one layer frozen": (2, ParallelSizes(), UNTIED, (0,)),
    "medium on one rank": (2, ParallelSizes(), UNTIED | VISION, ()),
    "ep2": (4, ParallelSizes(expert=2), EXPERTS, ()),
    "latent": (2, ParallelSizes(), LATENT, ()),
    "adapters on latent attention": (
        2,
        ParallelSizes(),
        LATENT | {"peft": LoraConfig(target_modules=["kv_b_proj", "o_proj"])},
        (),
    ),
    "tp2": (4, ParallelSizes(tensor=2), UNTIED | {"tensor_model_parallel_size": 2, "sequence_parallel": True}, ()),
    "pp2": (4, ParallelSizes(pipeline=2), {"pipeline_model_parallel_size": 2}, ()),
    "pp2, in pieces": (
        4,
        ParallelSizes(pipeline=2),
        UNTIED | {"num_layers": 4, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        (),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def found(request, tmp_path_factory) -> list[dict[bool, dict]]:
    ranks, sizes, fields, frozen = CASES[request.param]
    rng = fresh_generator()
    prompts = [[torch.randint(61, (n,), generator=rng).tolist() for n in (9, 4)] for _ in range(4)]
    if "vision" in fields:
        tokens = [5, *[60] * 4, 7, 8]
        prompts[1][0] = MediaPrompt.of(tokens, 60, [Video(1, 2, 2)], randn(rng, 4, 6))
    case = GatherCase(fields, prompts, RESPONSES, tmp_path_factory.mktemp("gathers"), frozen)
    return [cases[0] for cases in run_ranks(gathers, ranks, [case], sizes=sizes)]


def test_everything_is_bitwise_what_it_is_without(found):
    for rank in found:
        plain, overlapped = rank[False], rank[True]
        for name in ("losses", "sampled"):
            assert overlapped[name] == plain[name]
        assert len(plain["weights"]) == STEPS and len(plain["scores"]) > 1
        for a, b in zip(plain["scores"], overlapped["scores"], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(
            (*plain["weights"], plain["saved"]), (*overlapped["weights"], overlapped["saved"]), strict=True
        ):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        first, *_, last = plain["weights"]
        assert any(not torch.equal(first[name], last[name]) for name in first)
        assert all(torch.equal(last[name], weight) for name, weight in overlapped["saved"].items())


def test_gathers_are_under_way_after_a_step_and_awaited_by_the_first_pass(found):
    for rank in found:
        assert rank[False]["pending"] == [0] * STEPS and not any(rank[False]["left"])
        assert rank[True]["pending"] == [rank[True]["groups"]] * STEPS


def test_a_pass_waits_for_all_that_it_uses(found, request):
    """What no module has asked for: nothing, but a projector whose rank has seen no medium."""
    left = [max(rank[True]["left"]) for rank in found]
    media = "medium" in request.node.callspec.id
    assert left == ([1, 0] if media else [0] * len(found))
    assert media or all(rank[True]["groups"] > 1 for rank in found[:1])
