"""GRPO on responses that are drawn from the step's seed and not sampled from the model: whatever runs it, they are the same.

python -m tests.programs.given_responses OVERRIDE...   as recipes/train_grpo.py, on one rank
"""

from __future__ import annotations

import random
import runpy
import sys

from recipes.grpo import rollouts
from tests.harness import ROOT


def drawn(model, prompts, samples, params, draws) -> list[list[list[int]]]:
    """In the form of `megatron_ext.models.generation.generate`, of tokens that are in the prompt."""
    rng = random.Random(f"{draws.generator.initial_seed()} {draws.first}")
    return [
        [
            [*rng.choices(prompt, k=rng.randint(1, params.max_new_tokens - 1)), params.stop_token_id]
            for _ in range(samples)
        ]
        for prompt in prompts
    ]


if __name__ == "__main__":
    rollouts.generate = drawn
    sys.argv[0] = str(ROOT / "recipes/train_grpo.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
