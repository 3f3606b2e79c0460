"""What a source of rollouts answers: token ids and nothing but token ids.

Text sent back and read again as tokens need not become the tokens that were sampled, so nothing here holds text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from megatron_ext.errors import UserError

__all__ = ["FinishReason", "Passage", "Trajectory", "last_turn"]


class FinishReason(StrEnum):
    # One of the stop tokens was sampled.
    STOP = "stop"
    # A stop string was completed.
    STOP_STRING = "stop_string"
    # It was cut off at the most tokens that it might have.
    LENGTH = "length"
    # Its source gave it up.
    ABORTED = "aborted"


@dataclass(frozen=True)
class Passage:
    """Tokens in a row that came about in the same way.

    Attributes:
        tokens: ids, as the engine had them.
        logprobs: of sampled tokens: the sampler's log-probability of each, in nats, at its temperature, before any penalty or
            filter (a vLLM server's: after them); NaN where it is not known. None: the tokens were observed, such as a tool's
            output: they are context and never trained.
        weight_version: of sampled tokens: how many updates the weights had had that sampled them; None: not known.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    weight_version: int | None = None

    def __post_init__(self):
        for name in ("tokens", "logprobs"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if self.logprobs is not None and len(self.logprobs) != len(self.tokens):
            raise UserError(
                f"a passage of {len(self.tokens)} sampled tokens has {len(self.logprobs)} log-probabilities, not as many"
            )

    @property
    def sampled(self) -> bool:
        return self.logprobs is not None


@dataclass(frozen=True)
class Trajectory:
    """What follows a prompt: passages that were sampled and passages that were observed.

    Attributes:
        passages: in order.
        finish_reason: why it ends where it does.
        routes: integers [prompt + tokens - 1, layers, k], the experts that the sampler's routers chose, see
            `megatron_ext.grouping.routes`; None: not known.
    """

    passages: tuple[Passage, ...]
    finish_reason: FinishReason
    routes: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "passages", tuple(self.passages))
        object.__setattr__(self, "finish_reason", FinishReason(self.finish_reason))

    @classmethod
    def of_response(
        cls,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        finish_reason: FinishReason,
        weight_version: int | None = None,
        routes: np.ndarray | None = None,
    ) -> Trajectory:
        """One passage, sampled."""
        return cls((Passage(tuple(tokens), tuple(logprobs), weight_version),), finish_reason, routes)

    @property
    def tokens(self) -> list[int]:
        """All ids, in order."""
        return [token for passage in self.passages for token in passage.tokens]

    @property
    def mask(self) -> list[bool]:
        """For each token whether it was sampled."""
        return [passage.sampled for passage in self.passages for _ in passage.tokens]

    @property
    def logprobs(self) -> list[float]:
        """For each token the sampler's log-probability; 0 for observed ones, which `mask` leaves out."""
        return [x for p in self.passages for x in (p.logprobs if p.sampled else (0.0,) * len(p.tokens))]

    @property
    def turns(self) -> int:
        """How often something was said. A turn may be several passages, of weights of several versions."""
        sampled = [passage.sampled for passage in self.passages]
        return sum(now and not before for before, now in zip([False, *sampled], sampled, strict=False))

    @property
    def truncated(self) -> bool:
        """Whether it was cut off, and did not end by itself."""
        return self.finish_reason in (FinishReason.LENGTH, FinishReason.ABORTED)

    def __len__(self) -> int:
        return sum(len(passage.tokens) for passage in self.passages)


def last_turn(passages: Sequence[Passage]) -> tuple[list[int], list[int]]:
    """(tokens before it, its own) of the turn with which passages end."""
    begin = max((i + 1 for i, passage in enumerate(passages) if not passage.sampled), default=0)
    before, own = ([t for p in part for t in p.tokens] for part in (passages[:begin], passages[begin:]))
    return before, own
