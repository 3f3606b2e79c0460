"""Responses are what one rank samples one request at a time, token by token in fp64, whatever the layout and the room."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ext.attention.pages import PAGE
from megatron_ext.rollouts import Request, SamplingParams
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.rollout_scenarios import RolloutCase, rollouts
from tests.harness import run_ranks
from tests.sampling import Reckoning

MODEL = {"num_layers": 4, "share_embeddings_and_output_weights": False, "num_query_groups": 4}
LAYOUTS = {
    "tp2, sp": (ParallelSizes(tensor=2), {"sequence_parallel": True}),
    "pp2": (ParallelSizes(pipeline=2), {}),
    "pp2 in pieces": (ParallelSizes(pipeline=2), {"virtual_pipeline_model_parallel_size": 2}),
    "pp4": (ParallelSizes(pipeline=4), {}),
    "tp2 pp2": (ParallelSizes(tensor=2, pipeline=2), {}),
    "cp2": (ParallelSizes(context=2), {}),
}
LONGEST = 70
ONE = 5 * PAGE  # the longest prompt and one of its responses


@pytest.fixture(scope="module")
def one_rank():
    """Prompts of many lengths, five responses each, which end early, late or by a token; more prompts than lanes, and fewer. The
    first one and every other have an environment."""
    rng, answered = fresh_generator(), False
    while not answered:  # no response of the first prompt, which is also run alone, may say a stop token
        case, result = sampled_alone(rng)
        answered = result["answered"][0]
    for found in result["found"][1:]:
        assert tokens(found) == tokens(result["found"][0])
    assert result["asked"] > 0
    case.weights = result["weights"]
    return case, result["found"][0]


def sampled_alone(rng: torch.Generator) -> tuple[RolloutCase, dict]:
    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=rng).tolist()

    params = SamplingParams(LONGEST, (7, 19, 43), temperature=1.2, top_p=0.95)
    prompts = [draw(0, 61, length) for length in draw(2, 45, 6)]
    made = Request.each(prompts, 5, params, tuple(draw(0, 999, 2)))
    # One response of each at least has the time to say a stop token.
    requests = [r.limited([LONGEST, *draw(1, LONGEST + 1, 4)]) for r in made]
    requests = [replace(r, environment=None if i % 2 else Reckoning(3 + 7 * i)) for i, r in enumerate(requests)]
    case = RolloutCase(MODEL, draw(0, 2**31, 1)[0], requests, [None, 2 * ONE, ONE])
    (result,) = run_ranks(rollouts, 1, case)
    return case, result


def tokens(found) -> list[list[list[int]]]:
    return [[said for said, _ in group] for group in found]


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_rank_one_at_a_time(name, one_rank):
    sizes, changes = LAYOUTS[name]
    source, expected = one_rank
    fields = source.fields | changes | sizes.named
    budgets = [None, sizes.pipeline * 2 * ONE, sizes.pipeline * ONE]
    for requests in (source.requests, source.requests[:1]):
        case = RolloutCase(fields, source.weights, requests, budgets)
        ranks = run_ranks(rollouts, sizes.tensor * sizes.pipeline * sizes.context, case, sizes=sizes)
        model_parallel = sizes.tensor * sizes.pipeline
        assert [rank["asked"] > 0 for rank in ranks] == [i % model_parallel == 0 for i in range(len(ranks))]
        for rank in ranks:
            for found, lanes in zip(rank["found"], rank["lanes"], strict=True):
                assert tokens(found) == tokens(expected)[: len(requests)]
                assert len(lanes) == sizes.pipeline and all(lanes)  # every lane had something to do
                for a, b in zip(found, expected, strict=False):
                    for (_, x), (_, y) in zip(a, b, strict=True):
                        assert (torch.tensor(x) - torch.tensor(y)).abs().max() <= 1e-5  # of fp32 logits
