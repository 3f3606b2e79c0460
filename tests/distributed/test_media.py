"""A model that sees, under tensor, sequence, context and pipeline parallelism, against one rank: scores and gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.models.config import PositionEmbedding
from megatron_ext.runtime.distributed import ParallelSizes
from megatron_ext.vision import VisionConfig
from tests.conftest import fresh_generator
from tests.distributed.media_scenarios import MediaCase, media
from tests.distributed.sharding import assert_one_rank
from tests.gpt_cases import small_config
from tests.harness import run_ranks
from tests.layouts import randn
from tests.media_cases import FEATURES, cases

pytestmark = pytest.mark.distributed

BOUND = 1e-5
MODEL = {"num_layers": 4, "num_attention_heads": 16, "num_query_groups": 4, "vision": VisionConfig(FEATURES)}
SCHEMES = ("vrope", "hope(stride=0.75)")
LAYOUTS = {
    "tp2": (ParallelSizes(tensor=2), {}),
    "tp2 sp": (ParallelSizes(tensor=2), {"sequence_parallel": True}),
    "pp2": (ParallelSizes(pipeline=2), {"activations_checkpoint_granularity": "full"}),
    "cp2": (ParallelSizes(context=2), {}),
    "cp2 tp2 sp": (ParallelSizes(tensor=2, context=2), {"sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    rng, clear = fresh_generator(), False
    while not clear:  # rounding may choose between two tokens
        found, results = sampled_alone(rng, tmp_path_factory)
        clear = all(result["clear"] for result in results)
    for case, result in zip(found, results, strict=True):
        case.weights, case.load = result["weights"], True
    return found, results


def sampled_alone(rng: torch.Generator, tmp_path_factory) -> tuple[list[MediaCase], list[dict]]:
    prompts, responses = cases(rng)
    factors = randn(rng, sum(len(r) for rs in responses for r in rs)).float()
    found = []
    for scheme in SCHEMES:
        fields = MODEL | {"position_embedding": PositionEmbedding(scheme)}
        seed = int(torch.randint(2**31, (), generator=rng))
        found.append(MediaCase(fields, seed, prompts, responses, factors, tmp_path_factory.mktemp("weights") / scheme))
    (result,) = run_ranks(media, 1, found)
    return found, result["cases"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_rank(name, one_rank):
    """Scores, every gradient, greedy tokens; and one rank's checkpoint loads bitwise."""
    sizes, changes = LAYOUTS[name]
    changes = changes | sizes.named
    sources, expected = one_rank
    here = [MediaCase(**{**vars(case), "fields": case.fields | changes}) for case in sources]
    ranks = run_ranks(media, sizes.tensor * sizes.pipeline * sizes.context, here, sizes=sizes)
    for number, (case, single) in enumerate(zip(here, expected, strict=True)):
        assert all(map(torch.count_nonzero, single["gradients"].values()))
        assert_one_rank(ranks, number, small_config(**case.fields), single, BOUND)
        for result in (place["cases"][number] for place in ranks):
            assert all(torch.equal(result["loaded"][name], weight) for name, weight in result["weights"].items())
