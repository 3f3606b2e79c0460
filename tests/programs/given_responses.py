"""GRPO on responses that are drawn from the step's seed and not sampled from the model: whatever runs it, they are the same.

python -m tests.programs.given_responses OVERRIDE...   as recipes/train_grpo.py, on one rank
"""

from __future__ import annotations

import random
import runpy
import sys

from megatron_ext.rollouts import FinishReason, Trajectory
from recipes.grpo import trainer
from tests.harness import ROOT


class Drawn:
    """A source of tokens that are in the prompt."""

    def __init__(self, *args):
        pass

    def update_weights(self, version: int) -> None:
        pass

    def sample(self, requests) -> list[list[Trajectory]]:
        return [[self._response(request, i) for i in range(request.samples)] for request in requests]

    @staticmethod
    def _response(request, sample: int) -> Trajectory:
        rng = random.Random(f"{request.key} {sample}")
        tokens = rng.choices(request.prompt, k=rng.randint(1, request.params.max_new_tokens - 1))
        tokens.append(request.params.stop_token_ids[0])
        return Trajectory.of_response(tokens, [0.0] * len(tokens), FinishReason.STOP)


if __name__ == "__main__":
    trainer.MegatronSource = Drawn
    sys.argv[0] = str(ROOT / "recipes/train_grpo.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
