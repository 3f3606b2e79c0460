"""Fixtures for all tests: a world of one rank, and fresh random numbers that a failing test lets you repeat."""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.harness import hide_gpus

hide_gpus()
torch.set_num_threads(1)  # the tensors are tiny, and workers share the machine

# A loaded machine must not fail a property: only what holds counts here, not how long it took.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

SEED_VARIABLE = "TEST_SEED"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of one module on one worker: they share a run of ranks, made once per module.

    In the order of collection: the long modules, of recipes and ranks, have few tests, and would otherwise come last.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    return LoadScopeScheduling(config, log)


def fresh_generator() -> torch.Generator:
    """A generator with a new seed every time; the seed is printed, and TEST_SEED=... sets it."""
    seed = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(2**31))
    print(f"{SEED_VARIABLE}={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def rng() -> torch.Generator:
    return fresh_generator()


@pytest.fixture(scope="module")
def module_rng() -> torch.Generator:
    return fresh_generator()


@pytest.fixture(scope="session")
def world() -> torch.device:
    """torch.distributed and Megatron's process groups with this process as the only rank; gives the device."""
    from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed, shutdown

    device = initialize(ParallelSizes())
    set_seed(1)
    yield device
    shutdown()
