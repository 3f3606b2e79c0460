"""A model that sees, under tensor, sequence, context and pipeline parallelism, against one rank: scores and gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.models.config import PositionEmbedding, VisionConfig
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.scenarios import MediaCase, media
from tests.distributed.sharding import full_name, shard
from tests.engine_cases import gradient_floor, relative_error
from tests.gpt_cases import small_config
from tests.harness import run_ranks
from tests.layouts import randn
from tests.media_cases import FEATURES, cases

pytestmark = pytest.mark.distributed

BOUND = 1e-5
MODEL = {"num_layers": 4, "num_attention_heads": 16, "num_query_groups": 4, "vision": VisionConfig(FEATURES)}
SCHEMES = ("vrope", "mrope_interleaved")
LAYOUTS = {
    "tp2": (ParallelSizes(tensor=2), {}),
    "tp2 sp": (ParallelSizes(tensor=2), {"sequence_parallel": True}),
    "pp2": (ParallelSizes(pipeline=2), {"activations_checkpoint_granularity": "full"}),
    "cp2": (ParallelSizes(context=2), {}),
    "cp2 tp2 sp": (ParallelSizes(tensor=2, context=2), {"sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    rng = fresh_generator()
    prompts, responses = cases(rng)
    factors = randn(rng, sum(len(r) for rs in responses for r in rs)).float()
    found = []
    for scheme in SCHEMES:
        fields = MODEL | {"position_embedding": PositionEmbedding(scheme)}
        seed = int(torch.randint(2**31, (), generator=rng))
        found.append(MediaCase(fields, seed, prompts, responses, factors, tmp_path_factory.mktemp("weights") / scheme))
    (result,) = run_ranks(media, 1, found)
    for case, case_result in zip(found, result["cases"], strict=True):
        case.weights, case.load = case_result["weights"], True
    return found, result["cases"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_rank(name, one_rank):
    """Scores, every gradient, greedy tokens; and one rank's checkpoint loads bitwise."""
    sizes, changes = LAYOUTS[name]
    changes = changes | {
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "context_parallel_size": sizes.context,
    }
    sources, expected = one_rank
    here = [MediaCase(**{**vars(case), "fields": case.fields | changes}) for case in sources]
    ranks = run_ranks(media, sizes.tensor * sizes.pipeline * sizes.context, here, sizes=sizes)
    for number, (case, single) in enumerate(zip(here, expected, strict=True)):
        model, floor, seen = small_config(**case.fields), gradient_floor(single["gradients"]), set()
        for place in ranks:
            result = place["cases"][number]
            assert relative_error(result["scores"], single["scores"]) <= BOUND
            assert result["greedy"] == single["greedy"]
            for parameter, found in result["gradients"].items():
                whole = full_name(parameter, model, place["stage"])
                seen.add(whole)
                truth = shard(parameter, single["gradients"][whole], model, place["rank"])
                assert torch.count_nonzero(truth) and relative_error(found, truth, floor) <= BOUND, (place, parameter)
                assert torch.equal(result["loaded"][parameter], result["weights"][parameter]), parameter
        assert seen == set(single["gradients"])
