"""The random numbers behind sampling: one uniform for each token of each response, by counting.

Number i of a response depends on the response's key and on i alone: the same seed samples the same responses however they
are spread over ranks, batched, put off or begun again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["ResponseDraws"]

BLOCK = 64  # numbers made at a time


class ResponseDraws:
    """
    Args:
        key: of the response, e.g. (seed, step, number of the prompt, number of the sample). SeedSequence mixes all of it into
            the key of Philox 4x64-10 (Salmon et al., SC 2011), which counts.
    """

    def __init__(self, key: Sequence[int]):
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(tuple(key))))
        self._numbers = np.empty(0)

    def __getitem__(self, index: int) -> float:
        """The number behind token `index`, in [0, 1), with 53 random bits."""
        while index >= len(self._numbers):
            self._numbers = np.concatenate([self._numbers, self._generator.random(BLOCK)])
        return float(self._numbers[index])
