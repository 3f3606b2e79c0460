"""Sampled token ids, without what comes with them, and an environment in token ids."""

from __future__ import annotations

from megatron_ext.rollouts import MegatronSource, Request, SamplingParams

__all__ = ["Reckoning", "generate"]


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


class Reckoning:
    """An environment whose answers are reckoned from all that was said before: twice to each trajectory."""

    asked = 0  # of this process

    def __init__(self, length: int, vocab_size: int = 61):
        self.length, self.vocab_size = length, vocab_size

    def begin(self, sample: int) -> None:
        """It keeps nothing of a trajectory."""

    def observe(self, sample: int, passages) -> list[int] | None:
        type(self).asked += 1
        return self.answer(sample, passages)

    def answer(self, sample: int, passages) -> list[int] | None:
        said = sum(token * (i + 1) for i, token in enumerate(t for p in passages for t in p.tokens))
        return None if len(passages) > 3 else [(said + sample * i * i) % self.vocab_size for i in range(self.length)]
