"""The soft penalty for responses that are nearly too long.

Source: DAPO (arXiv 2503.14476), eq. 13. With a response of n tokens, at most L of them, and a buffer of C:

    0 where n <= L - C,   (L - C - n) / C where it is longer: -1 at the full length

| symbol | key of trainer.grpo |
|---|---|
| L | length_params.max_length |
| C | overlong_buffer |
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["overlong_penalty"]


def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """What is added to rewards, in the shape and type of `lengths`, floating; 0 without a buffer."""
    return ((longest - buffer - lengths) / max(buffer, 1)).clamp(-1, 0) * bool(buffer)
