"""A response while it is sampled: what it has said, the numbers behind what it will say, and whether it has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_ext.rollouts.draws import ResponseDraws
from megatron_ext.rollouts.requests import Request
from megatron_ext.rollouts.trajectories import FinishReason, Trajectory

__all__ = ["Decode", "Response"]

# (tokens of the prompt, tokens of the response) -> the text that the response adds to that of its prompt.
Decode = Callable[[Sequence[int], Sequence[int]], str]
# Characters that the bytes of a token that has been cut off may decode to.
CUT = 4


class Response:
    """
    Args:
        request: what asks for it.
        sample: its number among the request's samples.
        decode: for stop strings.

    Attributes:
        tokens, logprobs: what it has said.
        finish_reason: None: it goes on.
        draws: the random number behind each token.
    """

    def __init__(self, request: Request, sample: int, decode: Decode | None = None):
        self.request, self.params, self.limit = request, request.params, request.limit(sample)
        self.draws = ResponseDraws((*request.key, sample))
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self._ends, self._decode = request.params.ends, decode

    @property
    def prompt(self) -> list[int]:
        """The prompt's token ids."""
        prompt = self.request.prompt
        return list(getattr(prompt, "tokens", prompt))

    def add(self, token: int, logprob: float) -> None:
        """Say one more token; this may end it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self._ends:
            self.finish_reason = FinishReason.STOP
        elif self.params.stop_strings and self._completes_a_string():
            self.finish_reason = FinishReason.STOP_STRING
        elif len(self.tokens) >= self.limit:
            self.finish_reason = FinishReason.LENGTH

    def trajectory(self, weight_version: int | None) -> Trajectory:
        return Trajectory.of_response(self.tokens, self.logprobs, self.finish_reason, weight_version)

    def _completes_a_string(self) -> bool:
        """Whether a stop string is in the text. It was not before the last token, so only the end is looked at: as many tokens
        as it takes to show more than the longest string and the last token together."""
        strings = self.params.stop_strings
        longest = max(map(len, strings))
        size = longest + CUT
        while True:
            before, tail = self.tokens[:-size], self.tokens[-size:]
            text = self._decode([*self.prompt, *before], tail)
            if any(string in text for string in strings):
                return True
            last = len(self._decode([*self.prompt, *self.tokens[:-1]], self.tokens[-1:]))
            if not before or len(text) >= longest + last + CUT:
                return False
            size *= 2
