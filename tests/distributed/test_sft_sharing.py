"""Pairs that begin alike share that beginning, and learn what they learn one by one: loss and gradients in fp64, on any layout.

The truth is a plain GPT that sees one sequence at a time.
"""

from __future__ import annotations

import pytest
import torch

from megatron_ext.models import build_gpt
from megatron_ext.runtime.distributed import ParallelSizes
from recipes.data.rows import Pair, Prompt
from recipes.sft.settings import SFTModel
from tests.conftest import fresh_generator
from tests.distributed.sft_scenarios import exact_sft
from tests.distributed.sharding import full_name, shard
from tests.engine_cases import gradient_floor, relative_error
from tests.gpt_cases import randomize, small_config
from tests.harness import run_ranks
from tests.plain_gpt import plain_logprobs

pytestmark = pytest.mark.distributed

EXACT = 1e-10
MODEL = {
    "share_embeddings_and_output_weights": False,
    "qk_layernorm": False,
}  # what ranks have in common is summed by DDP
COMMON = 9  # tokens that all prompts but one begin with, as a system message
# What is shared, and how streams are filled.
WAYS = {
    "prompts": {"prefix_grouping": True, "min_shared_tokens": None, "micro_batch_size": 6},
    "trees": {"prefix_grouping": True, "min_shared_tokens": 4, "micro_batch_size": 6},
    "prompts by tokens": {"prefix_grouping": True, "min_shared_tokens": None, "micro_batch_tokens": 128},
    "trees by tokens": {"prefix_grouping": True, "min_shared_tokens": 4, "micro_batch_tokens": 128},
    "nothing by tokens": {"prefix_grouping": False, "min_shared_tokens": None, "micro_batch_tokens": 128},
    "as it pays": {"micro_batch_tokens": 128},
}
# Name -> (sizes, ranks, fields, ways).
LAYOUTS = {
    "one": (ParallelSizes(), 1, {}, [*WAYS]),
    "dp2": (ParallelSizes(), 2, {}, [*WAYS]),
    "tp2": (ParallelSizes(tensor=2), 2, {"tensor_model_parallel_size": 2}, ["trees", "prompts by tokens"]),
    "pp2": (ParallelSizes(pipeline=2), 2, {"pipeline_model_parallel_size": 2}, ["trees", "prompts by tokens"]),
    "cp2": (ParallelSizes(context=2), 2, {"context_parallel_size": 2}, ["trees", "prompts by tokens"]),
}


def draw_pairs(rng: torch.Generator) -> list[Pair]:
    """Four answers to one prompt, of which two begin alike, four to another, a conversation that goes on, and others, in any
    order; some learn drawn tokens alone."""

    def tokens(least: int, most: int) -> tuple[int, ...]:
        count = int(torch.randint(least, most, (), generator=rng))
        return tuple(torch.randint(61, (count,), generator=rng).tolist())

    system = tokens(COMMON, COMMON + 1)
    first, second, third = ((*system, *tokens(8, 20)) for _ in range(3))
    begin = tokens(6, 7)
    found = [(first, (*begin, *tokens(2, 9))) for _ in range(2)] + [(first, tokens(3, 20)) for _ in range(2)]
    found += [(second, tokens(3, 20)) for _ in range(4)]
    turn = tokens(4, 9)
    found += [(third, turn), ((*third, *turn, *tokens(3, 6)), tokens(4, 9))]
    found += [((*system, *tokens(3, 20)), tokens(3, 12)), (tokens(1, 5), tokens(4, 20))]
    order = torch.randperm(len(found), generator=rng).tolist()
    pairs = []
    for line, (prompt, response) in enumerate((found[i] for i in order), 1):
        learnt = (True, *(torch.rand(len(response) - 1, generator=rng) < 0.5).tolist()) if line % 3 == 0 else None
        pairs.append(Pair(Prompt(prompt, {}, line), response, learnt))
    return pairs


@pytest.fixture(scope="module")
def batch(world):
    """(weights, pairs, loss and gradients by the plain GPT)."""
    rng = fresh_generator()
    config = small_config(**MODEL)
    model = build_gpt(config, world)
    randomize(model, rng)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    pairs = draw_pairs(rng)
    exact = {name: w.double().requires_grad_() for name, w in weights.items()}
    loss = 0.0
    for pair in pairs:
        logprobs, _ = plain_logprobs(exact, config, list(pair.prompt.tokens), list(pair.response))
        loss = loss - logprobs[torch.tensor(pair.learnt or [True] * len(pair.response))].sum()
    loss = loss / sum(pair.num_learnt for pair in pairs)
    loss.backward()
    return weights, pairs, loss.item(), {name: w.grad for name, w in exact.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_shared_is_learnt_as_one_by_one(batch, layout):
    weights, pairs, loss, gradients = batch
    sizes, ranks, fields, ways = LAYOUTS[layout]
    model = vars(small_config(**MODEL, **fields)) | {"global_batch_size": len(pairs)}
    models = [SFTModel(**{**model, "micro_batch_size": 1, **WAYS[way]}) for way in ways]
    floor, tokens, unpadded = gradient_floor(gradients), {}, {}
    for result in run_ranks(exact_sft, ranks, models, weights, pairs, sizes=sizes):
        for way, config, (found, shards, *count) in zip(ways, models, result["cases"], strict=True):
            tokens[way], unpadded[way] = count
            assert found == pytest.approx(loss, rel=EXACT), way
            for name, value in shards.items():
                whole = gradients[full_name(name, config, result["stage"])]
                expected = shard(name, whole, config, result["rank"])
                assert relative_error(value, expected, floor) <= EXACT, (way, name)
    plain = sum(len(pair.prompt.tokens) + len(pair.response) for pair in pairs)
    assert all(count < plain for way, count in tokens.items() if not way.startswith("nothing")), (plain, tokens)
    if layout in ("one", "dp2"):
        # Each stream is padded: what a beginning saves may be less than that.
        assert unpadded["nothing by tokens"] == plain <= tokens["nothing by tokens"]
        assert unpadded["trees by tokens"] < unpadded["prompts by tokens"]
