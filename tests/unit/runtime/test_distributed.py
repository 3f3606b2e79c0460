"""How the world is divided, and a world of one rank without any launcher."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed, world_size


@pytest.mark.parametrize(("sizes", "world", "data"), [((1, 1), 1, 1), ((2, 1), 8, 4), ((2, 2), 8, 2), ((4, 2), 8, 1)])
def test_the_rest_of_the_world_is_data_parallel(sizes, world, data):
    assert ParallelSizes(*sizes).data(world) == data


@pytest.mark.parametrize(
    ("sizes", "world", "words"),
    [
        ((2, 2), 6, "6 processes cannot be divided by tensor_model_parallel_size=2 x pipeline_model_parallel_size=2"),
        ((2, 1), 1, "multiple of 2"),
        ((0, 1), 1, "tensor_model_parallel_size=0.*at least 1"),
        ((1, -1), 1, "pipeline_model_parallel_size=-1.*at least 1"),
    ],
)
def test_refuses_a_world_that_does_not_divide(sizes, world, words):
    with pytest.raises(ValueError, match=words):
        ParallelSizes(*sizes).data(world)


def test_initialize_refuses_before_it_starts_anything():
    with pytest.raises(ValueError, match="1 processes cannot be divided"):
        initialize(ParallelSizes(tensor=2))


def test_a_world_of_one_needs_no_launcher(world):
    assert world.type == "cpu" and world_size() == 1
    assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
    assert parallel_state.get_model_parallel_group().size() == 1


def test_a_seed_sets_every_generator(world):
    def draw():
        return random.random(), np.random.random(), torch.rand(2).tolist()  # noqa: NPY002 - the global one is meant

    set_seed(7)
    first = draw()
    set_seed(7)
    second = draw()
    set_seed(8)
    third = draw()
    assert first == second
    assert all(a != b for a, b in zip(first, third, strict=True))
