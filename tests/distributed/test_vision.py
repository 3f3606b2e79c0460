"""Vision towers under tensor, sequence, context and pipeline parallelism, against one rank: scores, gradients, a step."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.models.config import PositionEmbedding
from megatron_ext.runtime.distributed import ParallelSizes
from megatron_ext.runtime.optim import OptimConfig, SchedConfig
from megatron_ext.vision import VisionConfig
from tests.conftest import fresh_generator
from tests.distributed.sharding import assert_one_rank
from tests.distributed.vision_scenarios import SeeingCase, see
from tests.gpt_cases import small_config
from tests.harness import run_ranks
from tests.layouts import randn
from tests.seeing_families import SEEING

pytestmark = pytest.mark.distributed

BOUND = 1e-5
LAYOUTS = {
    "tp2 sp": (ParallelSizes(tensor=2), {"sequence_parallel": True}),
    "pp2": (ParallelSizes(pipeline=2), {"activations_checkpoint_granularity": "full"}),
    "cp2": (ParallelSizes(context=2), {}),
}
RATES = {"vision_lr": 3e-3, "vision_projection_lr": 2e-2}
# Which tower, and what trains.
CASES = {
    "frozen tower": ("llava, clip", {}),
    "all train": ("llava, siglip", {"freeze_vision_model": False}),
    "the connector alone": ("llava, clip", {"freeze_language_model": True}),
    "qwen2_vl": ("qwen2_vl", {"freeze_vision_model": False}),
    "qwen2_5_vl": ("qwen2_5_vl", {"freeze_vision_model": False}),
    "deepstack": ("qwen3_vl", {"freeze_vision_model": False}),
    "deepstack from a frozen tower": ("qwen3_vl", {}),
    "tiles": ("llava_onevision, tiles", {"freeze_vision_model": False}),
    "every image in tiles": ("llava_next, clip", {"freeze_vision_model": False}),
}


@pytest.fixture(scope="module")
def one_rank():
    rng, clear = fresh_generator(), False
    while not clear:  # rounding may choose between two tokens
        found, results = seen_alone(rng)
        clear = all(result["clear"] for result in results)
    for case, result in zip(found, results, strict=True):
        case.weights = result["weights"]
    return found, results


def seen_alone(rng: torch.Generator) -> tuple[list[SeeingCase], list[dict]]:
    responses = [[[1, 2, 3], [4, 5]], [[7], [8, 9]], [[1, 2]]]
    factors = randn(rng, sum(len(r) for group in responses for r in group)).float()
    found = []
    for number, (name, fields) in enumerate(CASES.values()):
        family = SEEING[name]
        one, film = family.media(rng)[:2]
        prompts = [family.prompt(rng, [2, one, 3, film, 1]), family.prompt(rng, [film, 2]), [5, 6, 7]]
        eyes = VisionConfig(**family.eyes)
        position = PositionEmbedding(name if name.startswith("qwen") else "rope")
        fields = {"vision": eyes, "vocab_size": 93, "num_layers": 4, "position_embedding": position} | fields
        optim = OptimConfig("adam", lr=1e-2, eps=1e-3, sched=SchedConfig(min_lr=1e-3), **(RATES if number else {}))
        seed = int(torch.randint(2**31, (), generator=rng))
        found.append(SeeingCase(fields, seed, prompts, responses, factors, optim))
    (result,) = run_ranks(see, 1, found)
    return found, result["cases"]


def test_rates_of_their_own(one_rank):
    """Adam's first step is the learning rate in size, where the gradient is large against eps."""
    sources, expected = one_rank
    for name, case, single in zip(CASES, sources, expected, strict=True):
        for parameter, gradient in single["gradients"].items():
            taken = (single["stepped"][parameter] - single["weights"][parameter]).abs().max().item()
            rate = case.optim.lr
            if name != "frozen tower":
                rate = next(
                    (r for k, r in (("tower", 3e-3), ("projector", 2e-2)) if k in parameter.split(".")[0]), rate
                )
            size = gradient.abs().max().item()
            assert taken == pytest.approx(rate * size / (size + 1e-3), rel=0.02, abs=1e-6), (name, parameter)
        still = {n for n, w in single["stepped"].items() if torch.equal(w, single["weights"][n])}
        frozen = single["weights"].keys() - single["gradients"].keys()
        # A tower's key biases have no gradient but what is rounded.
        assert frozen <= still and all(single["gradients"][n].abs().max() < 1e-6 for n in still - frozen)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_rank(name, one_rank):
    sizes, changes = LAYOUTS[name]
    changes = changes | sizes.named
    sources, expected = one_rank
    here = [SeeingCase(**{**vars(case), "fields": case.fields | changes}) for case in sources]
    ranks = run_ranks(see, 2, here, sizes=sizes)
    for number, (case, single) in enumerate(zip(here, expected, strict=True)):
        assert_one_rank(ranks, number, small_config(**case.fields), single, BOUND)
        counts = [place["cases"][number]["seen"] for place in ranks]
        if case.fields.get("freeze_vision_model", True):  # of the two media the ranks of a stream see one each
            assert single["seen"] == 2 and counts == {"pp2": [2, None]}.get(name, [1, 1])
        else:
            assert single["seen"] == 6 and all(count in (None, 6, 7) for count in counts)  # two lanes sample apart
