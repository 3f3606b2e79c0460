"""Whether a server has the weights that are trained: what it says of one text, beside what the trainer says.

Shape legend: t tokens of the text, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.rollouts.vllm.protocol import VllmError

__all__ = ["CANARY_TOKENS", "Canary"]

# More than a page of keys and values of a server (128 tokens on a CPU, 16 on a GPU): one that outlived its weights shows.
CANARY_TOKENS = 160
# Another than 1, which log-probabilities before it would agree with.
TEMPERATURE = 2.0
SAMPLES = 4


@dataclass(frozen=True)
class Canary:
    """A text, and what the trainer's weights say of it.

    Attributes:
        tokens: t of them, at least 2.
        expected: the log-probability of each token but the first, given those before it, at temperature 1.
        behind: fp32 [v], of each token that may follow, at TEMPERATURE.
        unscaled: the same at 1.
    """

    tokens: tuple[int, ...]
    expected: tuple[float, ...]
    behind: torch.Tensor
    unscaled: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: PrefixGroupedGPT, tokens: Sequence[int]) -> Canary:
        """Every rank of a model-parallel group calls, and each gets it."""
        logits = text_logits(model, tokens).float()
        logprobs = logits.log_softmax(-1)
        following = torch.tensor(tokens[1:], device=logits.device).unsqueeze(1)
        expected = logprobs[:-1].gather(1, following).squeeze(1)
        behind = (logits[-1] / TEMPERATURE).log_softmax(-1)
        return cls(tuple(tokens), tuple(expected.tolist()), behind.cpu(), logprobs[-1].cpu())

    def prompt_body(self, model: str) -> dict[str, Any]:
        """Asks for the log-probabilities of the text; a server computes them anew, whatever it has cached."""
        return {
            "model": model, "prompt": list(self.tokens), "max_tokens": 1, "temperature": 1.0, "ignore_eos": True,
            "prompt_logprobs": 0, "return_token_ids": True,
        }  # fmt: skip

    def sample_body(self, model: str) -> dict[str, Any]:
        """Asks for a few tokens behind it, as rollouts are asked for: perhaps from what is cached."""
        return {
            "model": model, "prompt": list(self.tokens), "max_tokens": 1, "temperature": TEMPERATURE, "n": SAMPLES,
            "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip

    def text_difference(self, answer: dict[str, Any]) -> float:
        """Mean |server - trainer| over the text, in nats.

        Raises:
            VllmError: an answer of another form.
        """
        try:
            (choice,) = answer["choices"]
            told = choice["prompt_logprobs"][1:]
            found = [entry[str(token)]["logprob"] for token, entry in zip(self.tokens[1:], told, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise _other_form(error) from error
        return _mean(found, self.expected)

    def sample_differences(self, answer: dict[str, Any]) -> tuple[float, float]:
        """Mean |server - trainer| over the tokens that were sampled: from log-probabilities at TEMPERATURE, and from those before
        it, which a server gives without --logprobs-mode processed_logprobs.

        Raises:
            VllmError: an answer of another form.
        """
        try:
            tokens = [choice["token_ids"][0] for choice in answer["choices"]]
            found = [choice["logprobs"]["token_logprobs"][0] for choice in answer["choices"]]
            behind, unscaled = self.behind[tokens].tolist(), self.unscaled[tokens].tolist()
        except (KeyError, TypeError, IndexError) as error:
            raise _other_form(error) from error
        return _mean(found, behind), _mean(found, unscaled)


def _mean(found: Sequence[float], expected: Sequence[float]) -> float:
    value = sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / len(expected)
    return value if math.isfinite(value) else math.inf


def _other_form(error: Exception) -> VllmError:
    return VllmError(
        f"the answer to the canary is not of the form that vLLM 0.32 gives ({type(error).__name__}: {error}): does the server "
        "have this model's vocabulary?"
    )
