"""What a source of rollouts is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_ext.errors import UserError
from megatron_ext.models.media import MediaPrompt
from megatron_ext.rollouts.trajectories import Passage

__all__ = ["Request", "SamplingParams", "TokenEnvironment"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    repetition_penalty, temperature, top_k, top_p and min_p apply in this order, which is that of transformers; 1, 1, 0, 1
    and 0 change nothing. `use_greedy` takes the most likely token, after the penalty.

    Attributes:
        max_new_tokens: a response is cut off there.
        stop_token_ids: each ends a response, and is its last token.
        stop_strings: each ends a response with the token that completes it in the text.
        ignore_eos: no token ends a response, `stop_token_ids` notwithstanding.
        repetition_penalty: divides the logits of tokens that are in the prompt or the response where they are positive, and
            multiplies them where they are negative (CTRL, arXiv 1909.05858, section 4.1).
        min_p: leaves out tokens less likely than this share of the likeliest (arXiv 2407.01082).
    """

    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    use_greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name in ("stop_token_ids", "stop_strings"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        bad_ids = [t for t in self.stop_token_ids if t < 0]
        rules = [
            (self.max_new_tokens < 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}"),
            (bool(bad_ids), f"stop_token_ids are ids of tokens, 0 or more, got {bad_ids}"),
            ("" in self.stop_strings, "stop_strings must not be empty texts: every text contains one"),
            (self.temperature <= 0, f"temperature must be positive, got {self.temperature}; use use_greedy for greedy"),
            (self.top_k < 0, f"top_k must not be negative, got {self.top_k}"),
            (not 0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}"),
            (not 0 <= self.min_p < 1, f"min_p must lie in [0, 1), got {self.min_p}"),
            (self.repetition_penalty <= 0, f"repetition_penalty must be positive, got {self.repetition_penalty}"),
        ]
        for broken, message in rules:
            if broken:
                raise UserError(message)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a response."""
        return frozenset() if self.ignore_eos else frozenset(self.stop_token_ids)


class TokenEnvironment(Protocol):
    """What answers the model in token ids when a turn of it has ended, for all samples of one request.

    Asked on the first rank of a model-parallel group alone, and from several threads at once for several samples.
    """

    def begin(self, sample: int) -> None:
        """A trajectory begins, or begins anew because a server has lost it."""
        ...

    def observe(self, sample: int, passages: Sequence[Passage]) -> Sequence[int] | None:
        """
        Args:
            passages: of the trajectory, the last one just sampled and ended by itself.

        Returns:
            Tokens that the model reads before it goes on; None: nothing follows.

        Raises:
            UserError: it cannot answer, which ends the run.
        """
        ...


@dataclass(frozen=True, eq=False)
class Request:
    """Responses wanted of one prompt.

    Attributes:
        prompt: token ids, or a prompt with media; not empty.
        samples: responses wanted.
        params: how they are sampled.
        key: what the random numbers of this prompt's responses are drawn from, beside the sample's number: e.g. (seed, step,
            the prompt's number in the step). The same key draws the same, whatever else is sampled beside.
        limits: for each sample the most tokens it may have, observed ones too, at most `params.max_new_tokens`; None: that for
            all.
        environment: what answers its turns; None: a response is one turn.
    """

    prompt: Sequence[int] | MediaPrompt
    samples: int
    params: SamplingParams
    key: tuple[int, ...] = (0,)
    limits: tuple[int, ...] | None = None
    environment: TokenEnvironment | None = None

    def __post_init__(self):
        if self.samples < 1:
            raise UserError(f"a request is for at least one sample, got {self.samples}")
        if self.limits is not None and (
            len(self.limits) != self.samples or not all(1 <= n <= self.params.max_new_tokens for n in self.limits)
        ):
            raise UserError(
                f"limits must be {self.samples} numbers of 1 to max_new_tokens={self.params.max_new_tokens}, one for each "
                f"sample, got {self.limits}"
            )

    @classmethod
    def each(
        cls,
        prompts: Sequence[Sequence[int] | MediaPrompt],
        samples: int,
        params: SamplingParams,
        key: tuple[int, ...] = (0,),
        first: int = 0,
    ) -> list[Request]:
        """As many samples of every prompt; the prompts' numbers, counted from `first`, complete their keys."""
        return [cls(prompt, samples, params, (*key, first + i)) for i, prompt in enumerate(prompts)]

    def limit(self, sample: int) -> int:
        """The most tokens that a sample may have."""
        return self.params.max_new_tokens if self.limits is None else self.limits[sample]

    def limited(self, limits: Sequence[int]) -> Request:
        """The same with limits of its own for each sample."""
        return replace(self, limits=tuple(limits))
