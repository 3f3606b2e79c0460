"""What the YAML of GRPO may say of how responses are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from megatron_ext.errors import UserError
from megatron_ext.rollouts import SamplingParams

__all__ = ["SamplingSection", "ValidationSamplingSection"]


@dataclass
class SamplingSection:
    # Must be false: greedy responses of a group are all alike and teach nothing.
    use_greedy: bool = False
    # Divides the logits, of rollouts and of the log-probabilities that are trained; above 0. Higher: responses vary
    # more.
    temperature: float = 1.0
    # Sample among so many likeliest tokens; 0: among all. Keep 0 unless the tail spoils responses: log-probabilities
    # are those of the unfiltered distribution, so a filter biases the gradient.
    top_k: int = 0
    # Sample among the likeliest tokens that together have this probability; 1: among all. A filter biases the gradient
    # like top_k.
    top_p: float = 1.0
    # Leave out tokens less likely than this share of the likeliest one; 0: none. A filter biases the gradient like top_k.
    min_p: float = 0.0
    # Divides the logits of tokens that are in the prompt or the response already (multiplies negative ones); 1: none. It
    # comes before the temperature, and biases the gradient like a filter.
    repetition_penalty: float = 1.0
    # Tokens that end a response, beside the tokenizer's eos_token and those of the model's generation_config.json.
    stop_token_ids: list[int] = field(default_factory=list)
    # Texts that end a response, with the token that completes them.
    stop_strings: list[str] = field(default_factory=list)
    # true: no token ends a response, only length_params.max_length and stop_strings.
    ignore_eos: bool = False

    def params(self, section: str, max_new_tokens: int, stop_token_ids: Sequence[int]) -> SamplingParams:
        """
        Args:
            section: dotted name, for messages.
            stop_token_ids: end a response, too.

        Raises:
            UserError: impossible values.
        """
        try:
            return SamplingParams(
                max_new_tokens=max_new_tokens,
                stop_token_ids=tuple(dict.fromkeys((*stop_token_ids, *self.stop_token_ids))),
                stop_strings=tuple(self.stop_strings),
                **{
                    f.name: getattr(self, f.name)
                    for f in fields(self)
                    if f.name not in ("stop_token_ids", "stop_strings")
                },
            )
        except UserError as error:
            raise UserError(f"trainer.grpo.{section} / length_params: {error}") from error


@dataclass
class ValidationSamplingSection(SamplingSection):
    # Take the likeliest token each time; then temperature, top_k, top_p and min_p must be left alone.
    use_greedy: bool = True

    def __post_init__(self):
        for name in ("temperature", "top_k", "top_p", "min_p"):
            value, default = getattr(self, name), getattr(type(self), name)
            if self.use_greedy and value != default:
                raise UserError(
                    f"trainer.grpo.validation_sampling_params.{name}={value} does nothing beside "
                    "use_greedy=true: set that to false"
                )
