"""What an objective is: the policy's term of the loss, token by token, and what it goes with.

One of one's own is a frozen dataclass that subclasses `Objective`, named in `trainer.grpo.objective` by its dotted path.

Shape legend: r predicted response tokens, k responses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from megatron_ext.errors import UserError

__all__ = ["NORMALISATIONS", "Objective", "PolicyTokens", "sum_by_response", "token_weights"]

NORMALISATIONS = ("token", "sequence", "constant")


@dataclass(frozen=True)
class PolicyTokens:
    """What an objective sees of a microbatch.

    Attributes:
        logprobs: [r], of the policy being trained; the only one with a gradient.
        old_logprobs: [r], of the policy that sampled.
        advantages: [r], the advantage of each token's response, less a KL penalty in the reward.
        weights: [r] from `token_weights`; 0 where a token does not count.
        response_ids: int64 [r], in [0, num_responses); None where nobody has said them.
        num_responses: k; on a GPU the host would have to wait for the largest id.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    response_ids: Tensor | None = None
    num_responses: int | None = None

    @property
    def log_ratio(self) -> Tensor:
        """[r]: log of the policy's probability over that of the policy that sampled."""
        return self.logprobs - self.old_logprobs

    def sequence_log_ratio(self) -> Tensor:
        """[r]: every token of a response gets the response's mean log ratio, and its own gradient.

        This is GSPO-token (section 4.3): where a response's tokens have one advantage and one weight it is GSPO, gradient
        included, and it stays well defined where the penalty in the reward gives each token an advantage of its own.

        Raises:
            UserError: nobody has said which token is of which response.
        """
        if self.response_ids is None or self.num_responses is None:
            raise UserError("ratios of whole responses need response_ids and num_responses")
        counts, values = (self.weights > 0).to(self.logprobs), self.log_ratio.detach()
        total, count = (sum_by_response(x, self.response_ids, self.num_responses) for x in (values * counts, counts))
        return (total / count.clamp(min=1))[self.response_ids] + (self.log_ratio - values)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """The policy's term of the loss, and what it goes with. Fields are the options of `trainer.grpo.objective`."""

    # What a subclass is about: these fields have these values alone.
    FIXED: ClassVar[Mapping[str, Any]] = {}
    # Whether responses cut off at max_length are left out, unless trainer.grpo.overlong_filtering says otherwise.
    FILTERS_OVERLONG: ClassVar[bool] = False
    # Share of max_length that trainer.grpo.overlong_buffer is unless it says otherwise.
    OVERLONG_BUFFER: ClassVar[float] = 0.0
    # trainer.grpo.max_sampling_rounds unless it says otherwise.
    SAMPLING_ROUNDS: ClassVar[int] = 1

    # token: every trained token of the batch weighs the same, so long responses weigh more. sequence: every response does.
    # constant: tokens weigh 1 / (responses of the batch x trainer.grpo.length_params.max_length), whatever was sampled.
    normalisation: str = "token"
    # How rewards become advantages: see `megatron_ext.losses.advantages`.
    advantages: str | dict[str, Any] = "group"

    def __post_init__(self):
        if self.normalisation not in NORMALISATIONS:
            raise UserError(f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {self.normalisation!r}")
        for name, value in self.FIXED.items():
            if (found := getattr(self, name)) != value:
                raise UserError(
                    f"{name}={_shown(found)} contradicts this objective, which has {name}={_shown(value)}: leave it out, or "
                    "name another objective"
                )

    @abstractmethod
    def policy_loss(self, tokens: PolicyTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Returns:
            ([r], the loss of each token before it is weighed; metrics, weighted sums that add up over microbatches and ranks as
            the loss does: "ratio", and "clip_fraction" where something is clipped).
        """


def token_weights(
    response_ids: Tensor,
    mask: Tensor,
    num_responses: int,
    global_tokens: float,
    global_responses: float,
    level: str,
    constant: float = 0.0,
) -> Tensor:
    """w [r] fp32: the weight of each token in the loss.

    level "token": 1 / (masked tokens of the GLOBAL batch). level "sequence": 1 / (masked tokens of the own response x
    responses with a masked token in the GLOBAL batch). level "constant": 1 / constant.

    Args:
        response_ids: int64 [r], response of each token within this microbatch.
        mask: bool [r], tokens that count.
        num_responses: k, responses of this microbatch.
        global_tokens, global_responses: totals over all microbatches and data-parallel ranks.
        constant: for that level, above 0.
    """
    if level == "token":
        return mask.float() / max(global_tokens, 1)
    if level == "constant":
        return mask.float() / constant
    if level != "sequence":
        raise UserError(f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {level!r}")
    lengths = sum_by_response(mask.float(), response_ids, num_responses)
    return mask.float() / (lengths.clamp(min=1)[response_ids] * max(global_responses, 1))


def sum_by_response(values: Tensor, response_ids: Tensor, num_responses: int) -> Tensor:
    """Sum of [r] values per response, [k]."""
    return values.new_zeros(num_responses).index_add(0, response_ids, values)


def _shown(value: Any) -> Any:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else value
