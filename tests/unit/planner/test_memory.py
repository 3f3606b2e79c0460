"""What sampling holds is what its cache really allocates."""

from __future__ import annotations

import gc
import random

import pytest

from megatron_ext.attention.cache import SharedPrefixCache
from megatron_ext.models import build_gpt
from megatron_ext.planner import Job
from megatron_ext.planner.memory import keys_and_values, sampled_together, stage_memory
from megatron_ext.rollouts import MegatronSource, Request, SamplingParams
from tests.gpt_cases import small_config


def held() -> int:
    """Bytes of the one cache that is in use."""
    (cache,) = (o for o in gc.get_objects() if isinstance(o, SharedPrefixCache))
    found = [*cache.prefix.values(), *cache.response.values()]
    return sum(t.untyped_storage().nbytes() for pair in found for t in pair)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_cache_of_sampling_is_exact(precision, world):
    draw = random.Random()
    prompts, prompt, samples, response = (draw.randint(1, high) for high in (5, 40, 6, 9))
    config = small_config(num_layers=draw.randint(1, 4), precision=precision)
    gc.collect()
    tokens = [[draw.randrange(61) for _ in range(prompt)] for _ in range(prompts)]
    seen = []
    params = SamplingParams(response + 1, stop_strings=("never",))
    source = MegatronSource(build_gpt(config, world), lambda before, said: seen.append(held()) or "")
    source.sample(Request.each(tokens, samples, params))
    rows = -(-prompts * prompt // 16) * 16
    assert seen[-1] == keys_and_values(config, 0, rows, prompts * samples * (response + 1))


def test_a_ranks_share_of_the_prompts_is_sampled_together():
    """24 prompts of 2 updates over 2 data- and 2 context-parallel ranks: 12 each, in parts of at most 5."""
    config = small_config(context_parallel_size=2, num_attention_heads=8).on("cpu")
    job = Job(config, 1, 4, groups=24, prompt=30, response=10, samples=3, updates=2, rollout=True)
    assert sampled_together(job) == 12
    few = Job(config, 1, 4, groups=24, prompt=30, response=10, samples=3, updates=2, rollout=True, rollout_prompts=5)
    assert sampled_together(few) == 5
    assert stage_memory(few, 0).cache < stage_memory(job, 0).cache
    assert stage_memory(job, 0).cache > keys_and_values(config, 0, 12 * 30, 12 * 3 * 10)
