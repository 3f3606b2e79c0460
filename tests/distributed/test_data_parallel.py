"""One batch, cut into microbatches or spread over data-parallel ranks, gives one gradient and one optimizer step.

The groups hold unequal numbers of tokens, the ranks unequal numbers of groups and microbatches, and a mask leaves out
tokens: only normalisation by the counts of the global batch gets this right. fp32, bound as in test_layouts.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_ext.losses.objective import NORMALISATIONS
from megatron_ext.models import build_gpt
from megatron_ext.runtime.distributed import ParallelSizes
from tests.conftest import fresh_generator
from tests.distributed.data_scenarios import DataCase, data_parallel
from tests.distributed.scenarios import CLIP, OPTIMIZERS
from tests.distributed.sharding import shard
from tests.engine_cases import counts, edges_of, gradient_floor, relative_error
from tests.gpt_cases import make_rollout, randomize, small_config
from tests.harness import run_ranks
from tests.layouts import error

pytestmark = pytest.mark.distributed

BOUND = 1e-5
MODEL = {"num_attention_heads": 16, "num_query_groups": 4}
LENGTHS = [(21, [9, 13, 4]), (2, [1, 3]), (6, [0, 5]), (3, [2])]
TOKENS = sum(sum(responses) for _, responses in LENGTHS)
WHOLE = [[[0, 1, 2, 3]]]
TENSOR_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# Name -> (ranks, changes to the model, [microbatches of each data-parallel rank]).
SPREADS = {
    "two microbatches": (1, {}, [[[0, 2], [1, 3]]]),
    "three microbatches": (1, {}, [[[3], [0], [1, 2]]]),
    "dp2": (2, {}, [[[0]], [[1], [2, 3]]]),
    "dp2 cp2": (4, {"context_parallel_size": 2}, [[[0]], [[1], [2, 3]]]),
    "dp2 tp2 sequence parallel": (4, TENSOR_PARALLEL, [[[0, 3]], [[2], [1]]]),
}


class Batch:
    """The batch, the weights, and what one rank makes of the batch in one microbatch."""

    def __init__(self, device: torch.device):
        rng = fresh_generator()
        model = build_gpt(small_config(**MODEL), device)
        clear = False
        while not clear:  # all tokens may be kept, and rounding may decide whether a ratio is clipped
            randomize(model, rng)
            self.rollout = make_rollout(rng, LENGTHS, 61)
            clear = edges_of(model, self.rollout).clear and counts(self.rollout)["tokens"] < TOKENS
            if clear:
                self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
                (self.expected,) = run_ranks(data_parallel, 1, self.case({}, WHOLE))
                # One response may outweigh all others, and the gradient may be too small to be clipped.
                clear = self.least_difference() > 1000 * BOUND and self.least_norm() > CLIP

    def least_difference(self) -> float:
        """Of any gradient between any two normalisations."""
        runs = [run["gradients"] for run in self.expected["gradients"].values()]
        return min(
            relative_error(one[name], gradient)
            for one, other in itertools.combinations(runs, 2)
            for name, gradient in other.items()
        )

    def least_norm(self) -> float:
        return min(run["report"]["grad_norm"] for run in self.expected["steps"].values())

    def case(self, changes: dict, spread: list[list[list[int]]]) -> DataCase:
        return DataCase(MODEL | changes, self.weights, self.rollout, spread)


@pytest.fixture(scope="module")
def batch(world) -> Batch:
    return Batch(world)


class Spread:
    """The results of every rank for one way to spread the batch."""

    def __init__(self, name: str, batch: Batch):
        ranks, changes, spread = SPREADS[name]
        self.config = small_config(**(MODEL | changes))
        sizes = ParallelSizes(tensor=self.config.tensor_model_parallel_size, context=self.config.context_parallel_size)
        self.results = run_ranks(data_parallel, ranks, batch.case(changes, spread), sizes=sizes)

    def pairs(self, find, batch: Batch):
        """(name, this rank's tensor, the same part of the one rank's) for every rank and parameter."""
        for result in self.results:
            found, expected = find(result), find(batch.expected)
            assert found.keys() == expected.keys()
            for name, value in found.items():
                yield name, value, shard(name, expected[name], self.config, result["rank"])


@pytest.fixture(scope="module", params=SPREADS)
def spread(request, batch) -> Spread:
    return Spread(request.param, batch)


def test_the_counts_are_those_of_the_global_batch(spread: Spread, batch: Batch):
    expected = counts(batch.rollout)
    assert 0 < expected["tokens"] < TOKENS
    for result in spread.results:
        assert all(run["totals"] == expected for run in result["gradients"].values())


def test_every_rank_starts_from_the_first_ranks_weights(spread: Spread, batch: Batch):
    """Bitwise, although the others were initialised with another seed."""
    for result in spread.results:
        for name, value in result["gradients"]["token"]["started"].items():
            assert torch.equal(value, shard(name, batch.weights[name], spread.config, result["rank"]))


@pytest.mark.parametrize("level", NORMALISATIONS)
def test_every_gradient_is_that_of_the_whole_batch(level, spread: Spread, batch: Batch):
    """On every rank, after the data-parallel sum."""
    floor = gradient_floor(batch.expected["gradients"][level]["gradients"])
    for name, found, expected in spread.pairs(lambda r: r["gradients"][level]["gradients"], batch):
        assert relative_error(found, expected, floor) <= BOUND, name


def test_the_normalisations_differ(batch: Batch):
    """Guards the test above: they are different losses here."""
    assert batch.least_difference() > 1000 * BOUND


@pytest.mark.parametrize("level", NORMALISATIONS)
def test_loss_and_metrics_are_those_of_the_whole_batch(level, spread: Spread, batch: Batch):
    for result in spread.results:
        found, expected = (r["gradients"][level]["metrics"] for r in (result, batch.expected))
        assert found == pytest.approx(expected, rel=BOUND, abs=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_step_gives_the_parameters_of_one_rank(optimizer, spread: Spread, batch: Batch):
    """With the optimizer's state on every rank, and sharded over the data-parallel ranks."""
    for result in spread.results:
        report = result["steps"][optimizer]["report"]
        assert report == pytest.approx(batch.expected["steps"][optimizer]["report"], rel=BOUND)
        assert report["grad_norm"] > CLIP
        ours, megatrons = result["steps"][optimizer]["norms"]
        assert ours == pytest.approx(megatrons, rel=1e-6) and ours == report["grad_norm"]
    for name, found, expected in spread.pairs(lambda r: r["steps"][optimizer]["stepped"], batch):
        assert error(found, expected) <= BOUND, name
    steps = batch.expected["steps"][optimizer]["stepped"]
    assert min(error(steps[name], w) for name, w in batch.weights.items()) > 50 * BOUND


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(optimizer, spread: Spread):
    for result in spread.results:
        run = result["steps"][optimizer]
        assert run["refused"]
        assert all(torch.equal(run["stepped"][name], w) for name, w in run["after refusal"].items())
