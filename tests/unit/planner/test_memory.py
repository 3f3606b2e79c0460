"""What sampling holds is what its cache really allocates."""

from __future__ import annotations

import dataclasses
import random

import pytest

from megatron_ext.attention.pages import PAGE, pages_of
from megatron_ext.models import build_gpt
from megatron_ext.planner import Job
from megatron_ext.planner.memory import keys_and_values, sampled_together, stage_memory
from megatron_ext.rollouts import MegatronSource, Request, SamplingParams
from tests.gpt_cases import small_config


def held(source: MegatronSource) -> int:
    """Bytes of its pools."""
    pools = (lane.pool for lane in source.lanes)
    return sum(x.untyped_storage().nbytes() for pool in pools for pair in pool.layers.values() for x in pair)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_cache_of_sampling_follows_what_is_written(precision, world):
    """Within a sixteenth of it, in pages; responses that are as long as they may be are what is planned for."""
    draw = random.Random()
    prompts, prompt, samples, response = (draw.randint(1, high) for high in (5, 40, 6, 40))
    config = small_config(num_layers=draw.randint(1, 4), precision=precision)
    tokens = [[draw.randrange(61) for _ in range(prompt)] for _ in range(prompts)]
    seen = []
    params = SamplingParams(response + 1, stop_strings=("never",))
    source = MegatronSource(build_gpt(config, world), lambda before, said: seen.append(held(source)) or "")
    source.sample(Request.each(tokens, samples, params))
    written = PAGE * prompts * (pages_of(prompt) + samples * pages_of(response))
    assert source.lanes[0].pool.peak * PAGE == written
    least = keys_and_values(config, 0, written)
    assert least <= seen[-1] <= least * 17 / 16
    job = Job(config, 1, 1, groups=prompts, prompt=prompt, response=response, samples=samples, rollout=True)
    assert stage_memory(job, 0).cache >= least * 17 // 16


def test_a_ranks_share_of_the_prompts_is_sampled_together():
    """24 prompts of 2 updates over 2 data- and 2 context-parallel ranks: 12 each; a group fills 4 pages."""
    config = small_config(context_parallel_size=2, num_attention_heads=8).on("cpu")
    job = Job(config, 1, 4, groups=24, prompt=30, response=10, samples=3, updates=2, rollout=True)
    assert sampled_together(job) == 12
    few = dataclasses.replace(job, rollout_tokens=5 * 4 * PAGE + 1)
    assert sampled_together(few) == 5 and sampled_together(dataclasses.replace(job, rollout_tokens=99)) == 1
    assert stage_memory(few, 0).cache < stage_memory(job, 0).cache
    assert stage_memory(job, 0).cache > keys_and_values(config, 0, 12 * 4 * PAGE)
