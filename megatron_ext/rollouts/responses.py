"""A response while it is sampled: what it has said and observed, the numbers behind what it will say, whether it has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_ext.errors import UserError
from megatron_ext.rollouts.draws import ResponseDraws
from megatron_ext.rollouts.requests import Request
from megatron_ext.rollouts.trajectories import FinishReason, Passage, Trajectory

__all__ = ["NO_TOKENS", "TURN_ENDS", "Decode", "Response"]

# (tokens of the prompt, tokens of the response) -> the text that the response adds to that of its prompt.
Decode = Callable[[Sequence[int], Sequence[int]], str]
# Characters that the bytes of a token that has been cut off may decode to.
CUT = 4
# What ends a turn, behind which an environment may go on.
TURN_ENDS = (FinishReason.STOP, FinishReason.STOP_STRING)
NO_TOKENS = "an environment answers with no token: give one at least, or None where a trajectory ends"


class Response:
    """
    Args:
        request: what asks for it.
        sample: its number among the request's samples.
        decode: for stop strings.
        before: what it has said and observed before the turn that is looked at.

    Attributes:
        tokens, logprobs: what it has said, and what it has observed in between, whose log-probabilities are 0.
        finish_reason: None: it goes on.
        draws: the random number behind each token.
    """

    def __init__(self, request: Request, sample: int, decode: Decode | None = None, before: Sequence[int] = ()):
        self.request, self.sample, self.params, self.limit = request, sample, request.params, request.limit(sample)
        self.draws = ResponseDraws((*request.key, sample))
        self.tokens: list[int] = list(before)
        self.logprobs: list[float] = [0.0] * len(before)
        self.finish_reason: FinishReason | None = None
        self._observed: list[slice] = [slice(0, len(before))] if before else []
        self._ends, self._decode = request.params.ends, decode

    @property
    def prompt(self) -> list[int]:
        """The prompt's token ids."""
        prompt = self.request.prompt
        return list(getattr(prompt, "tokens", prompt))

    @property
    def awaits(self) -> bool:
        """Whether a turn has ended that its environment is to answer."""
        return self.request.environment is not None and self.finish_reason in TURN_ENDS

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

    def observe(self, tokens: Sequence[int] | None) -> None:
        """What its environment answers to a turn; None: it has ended. So it has where nothing could be said behind the answer."""
        if tokens is None:
            return
        if not tokens:
            raise UserError(NO_TOKENS)
        if len(self.tokens) + len(tokens) >= self.limit:
            self.finish_reason = FinishReason.LENGTH
            return
        self._observed.append(slice(len(self.tokens), len(self.tokens) + len(tokens)))
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.finish_reason = None

    def passages(self, weight_version: int | None) -> list[Passage]:
        found, start = [], 0
        for seen in self._observed:
            found += [self._said(start, seen.start, weight_version)] if start < seen.start else []
            found.append(Passage(self.tokens[seen]))
            start = seen.stop
        if start < len(self.tokens):
            found.append(self._said(start, len(self.tokens), weight_version))
        return found

    def trajectory(self, weight_version: int | None) -> Trajectory:
        return Trajectory(self.passages(weight_version), self.finish_reason)

    def _said(self, start: int, stop: int, weight_version: int | None) -> Passage:
        return Passage(self.tokens[start:stop], self.logprobs[start:stop], weight_version)

    def _completes_a_string(self) -> bool:
        """Whether a stop string is in the text of this turn. It was not before the last token, so only the end is looked at: as
        many tokens as it takes to show more than the longest string and the last token together."""
        strings = self.params.stop_strings
        longest = max(map(len, strings))
        begin = self._observed[-1].stop if self._observed else 0
        prompt, said = [*self.prompt, *self.tokens[:begin]], self.tokens[begin:]
        size = longest + CUT
        while True:
            before, tail = said[:-size], said[-size:]
            text = self._decode([*prompt, *before], tail)
            if any(string in text for string in strings):
                return True
            last = len(self._decode([*prompt, *said[:-1]], said[-1:]))
            if not before or len(text) >= longest + last + CUT:
                return False
            size *= 2
