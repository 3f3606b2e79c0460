"""Sampled token ids, without what comes with them."""

from __future__ import annotations

from megatron_ext.rollouts import MegatronSource, Request, SamplingParams

__all__ = ["generate"]


def generate(
    model, prompts, samples: int, params: SamplingParams, seed: int = 0, first: int = 0, **options
) -> list[list[list[int]]]:
    """The token ids of so many responses to every prompt.

    Args:
        seed, first: of the random numbers: a seed, and the number of the first prompt.
        options: of the source.
    """
    found = MegatronSource(model, **options).sample(Request.each(prompts, samples, params, (seed,), first))
    return [[trajectory.tokens for trajectory in group] for group in found]
