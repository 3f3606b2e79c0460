"""Who is sampled when: requests wait for pages, responses leave as they end, and the newest step back when pages run out.

Numbers of the host only, and no more than every rank of a model-parallel group knows: all of them decide alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_ext.attention.cache import Row
from megatron_ext.attention.pages import PAGE, PagePool, Table, pages_of
from megatron_ext.errors import UserError
from megatron_ext.rollouts.requests import Request
from megatron_ext.rollouts.responses import Decode, Response

__all__ = ["PREFILL_TOKENS", "Lane", "Sampled", "check_fits", "deal"]

# Tokens that are run together before any response of theirs is sampled; a longer prompt is run alone.
PREFILL_TOKENS = 8192
# Tokens of one response that are run at once where it has observed some: as many rows read its pages side by side.
OBSERVED_TOKENS = 64


@dataclass(eq=False)
class _Prompt:
    """A request with its pages, which are there while a response of it is sampled."""

    request: Request
    table: Table | None = None
    written: bool = False
    running: int = 0

    @property
    def length(self) -> int:
        return len(self.request.prompt)


@dataclass(eq=False)
class Sampled:
    """A response in a lane.

    Attributes:
        own: its pages, while it is sampled.
        written: of its tokens, those whose keys and values are in them.
    """

    prompt: _Prompt
    response: Response
    own: Table | None = None
    written: int = 0

    def rows(self, stop: int) -> list[Row]:
        """Its places in a decoding step that runs its tokens up to this one."""
        lengths = range(self.written + 1, stop + 1)
        return [Row(self.prompt.table, self.own, self.prompt.length, length) for length in lengths]

    @property
    def missing(self) -> int:
        """Pages that its tokens need beside those that it has."""
        return max(0, pages_of(len(self.response.tokens)) - len(self.own.pages))


@dataclass(eq=False)
class Lane:
    """Responses that are decoded together. Pipeline stages work on as many lanes at a time as there are stages.

    Attributes:
        waiting: responses without pages, in the order in which they are to get them.
        running: responses with pages, the newest last.
        stepped_back: how often one had to give its pages back before its end.
    """

    pool: PagePool
    waiting: deque[Sampled] = field(default_factory=deque)
    running: list[Sampled] = field(default_factory=list)
    stepped_back: int = 0
    _ended: int = 0  # responses, and their tokens
    _said: int = 0

    def add(self, request: Request, responses: Sequence[Response]) -> None:
        prompt = _Prompt(request)
        self.waiting.extend(Sampled(prompt, response) for response in responses)

    @property
    def done(self) -> bool:
        return not self.waiting and not self.running

    def enter(self) -> list[Sampled]:
        """Those that get pages now: as many as there is room for beside what those that run are expected to say yet."""
        entered: list[Sampled] = []
        if not self.waiting:
            return entered
        tokens, promised = 0, sum(map(self._to_come, self.running))
        while self.waiting:
            new = self.waiting[0]
            said = len(new.response.tokens)
            first = not any(other.prompt is new.prompt for other in entered[-1:])
            tokens += said + (new.prompt.length if first else 0)
            needed = self._to_come(new) + (pages_of(new.prompt.length) if new.prompt.table is None else 0)
            alone = not self.running  # what it takes at most was seen to fit
            if (entered and tokens > PREFILL_TOKENS) or not (alone or self.pool.fits(needed + promised)):
                break
            self.waiting.popleft()
            if new.prompt.table is None:
                new.prompt.table = self.pool.new(shared=True)
                self.pool.extend(new.prompt.table, new.prompt.length)
            new.own = self.pool.new(shared=False)
            self.pool.extend(new.own, said + 1)
            new.prompt.running += 1
            promised += self._to_come(new)
            self.running.append(new)
            entered.append(new)
        return entered

    def _to_come(self, sampled: Sampled) -> int:
        """Pages that it is expected to take yet: up to the mean length of those that have ended, or its limit before any has."""
        response = sampled.response
        expected = self._said // self._ended if self._ended else response.limit
        tokens = min(max(expected, len(response.tokens) + 1), response.limit)
        return pages_of(tokens) - len(sampled.own.pages if sampled.own else ())

    def step(self) -> list[tuple[Sampled, int]]:
        """Those that run now, each with how many of its tokens will have been run, and room for those: the last one, and what
        it has observed, as much as may run at once. Where pages run out the newest steps back."""
        running: list[tuple[Sampled, int]] = []
        more, missing = PREFILL_TOKENS, sum(sampled.missing for sampled in self.running)
        while len(running) < len(self.running):
            sampled = self.running[len(running)]
            new = min(len(sampled.response.tokens) - sampled.written, OBSERVED_TOKENS, 1 + more)
            tokens = sampled.written + new
            if (needed := pages_of(tokens) - len(sampled.own.pages)) > 0:
                if not self.pool.fits(needed):
                    self._step_back()
                    continue
                missing -= needed
                self.pool.extend(sampled.own, tokens, more=missing)
            more -= new - 1
            running.append((sampled, tokens))
        self.pool.tidy()
        return running

    def leave(self) -> None:
        """Take those out that have ended."""
        for sampled in self.running:
            if sampled.response.finish_reason:
                self._free(sampled)
                self._ended += 1
                self._said += len(sampled.response.tokens)
        self.running = [s for s in self.running if not s.response.finish_reason]

    def _step_back(self) -> None:
        sampled = self.running.pop()
        self._free(sampled)
        self.waiting.appendleft(sampled)
        self.stepped_back += 1

    def _free(self, sampled: Sampled) -> None:
        self.pool.free(sampled.own)
        sampled.own, sampled.written = None, 0
        sampled.prompt.running -= 1
        if not sampled.prompt.running:
            self.pool.free(sampled.prompt.table)
            sampled.prompt.table, sampled.prompt.written = None, False


def deal(requests: Sequence[Request], lanes: Sequence[Lane], decode: Decode | None) -> list[list[Response]]:
    """Give every request to the lane that has the least to do; where there are fewer requests than lanes, each lane gets a part
    of the samples. Returns the responses of each request."""
    work = [0] * len(lanes)
    made = [[Response(request, i, decode) for i in range(request.samples)] for request in requests]
    cuts = 1 if len(requests) >= len(lanes) else len(lanes)
    for request, responses in zip(requests, made, strict=True):
        for cut in range(cuts):
            part = responses[cut::cuts]
            if part:
                lane = work.index(min(work))
                lanes[lane].add(request, part)
                work[lane] += sum(response.limit for response in part)
    return made


def check_fits(requests: Sequence[Request], pages: int, tokens: int) -> None:
    """
    Args:
        pages: of one lane.
        tokens: `rollout_tokens`, for the message.

    Raises:
        UserError: a prompt and one response of it, however long that may become, have no room even alone.
    """
    for number, request in enumerate(requests):
        longest = max(map(request.limit, range(request.samples)))
        needed = pages_of(len(request.prompt)) + pages_of(longest)
        if needed > pages:
            raise UserError(
                f"prompt {number} has {len(request.prompt)} tokens; with max_new_tokens={longest} that is {needed} pages "
                f"of {PAGE} tokens, and rollout_tokens={tokens} gives a pipeline stage's lane {pages}: raise it"
            )
