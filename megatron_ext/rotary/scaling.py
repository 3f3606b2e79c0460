"""Rotary frequencies of models that were stretched to longer sequences, as transformers' `ROPE_INIT_FUNCTIONS` have them.

    linear    every frequency `factor` times as low (positional interpolation, arXiv 2306.15595)
    dynamic   as they were up to the original length, another base beyond it (NTK-aware)
    yarn      fast pairs as they were, slow ones `factor` times as low, those between in between; cosines and sines are multiplied
              by an attention factor (arXiv 2309.00071)
    longrope  a factor for each pair, one set up to the original length and another beyond it (arXiv 2402.13753)
    llama3    long waves `factor` times as low, short ones as they were (arXiv 2407.21783)

`dynamic` and `longrope` depend on how long the whole sequence is, which transformers takes from the largest position of its
batch. A prompt that is shared has one set of keys, whatever the length of its responses, and keys that sampling has kept are
not turned again: so the length here is the longest that a sequence may become, `model.encoder_seq_length`, and a model that may
grow past the original length is refused (`longest`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError

__all__ = ["ROPE_TYPES", "RopeScaling"]

# What each type reads beside rope_type; every other key must be left out.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}  # fmt: skip
BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary frequencies; the names are those of Hugging Face's config.json, and all come with the weights.

    Raises:
        UserError: numbers without meaning, or a key of another type.
    """

    # How many times as long the sequences are; at least 1.
    factor: float = 8.0
    # llama3: waves of more tokens than original_max_position_embeddings / this turn `factor` times as slowly.
    low_freq_factor: float = 1.0
    # llama3: waves of fewer tokens than original_max_position_embeddings / this stay as they are; those between in between.
    high_freq_factor: float = 4.0
    # Tokens of the sequences that the model was first trained on. Without meaning in linear.
    original_max_position_embeddings: int = 8192
    # llama3, linear, dynamic, yarn or longrope.
    rope_type: str = "llama3"
    # yarn: pairs that turn more often than this within the original length stay as they are.
    beta_fast: float = 32.0
    # yarn: pairs that turn less often than this turn `factor` times as slowly; those between in between.
    beta_slow: float = 1.0
    # yarn and longrope: cosines and sines are multiplied by it; null: by the formula of the type's paper.
    attention_factor: float | None = None
    # yarn: with mscale_all_dim, another formula of the attention factor, DeepSeek's.
    mscale: float | None = None
    # yarn: see mscale.
    mscale_all_dim: float | None = None
    # yarn: the bounds of the pairs in between are rounded outwards.
    truncate: bool = True
    # longrope: of each pair, how many times as slowly it turns in sequences up to the original length.
    short_factor: list[float] | None = None
    # longrope: the same beyond the original length. It comes with the weights and is not used: see model.encoder_seq_length.
    long_factor: list[float] | None = None

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope_type={self.rope_type!r} must be one of {', '.join(ROPE_TYPES)}")
        for name in ("short_factor", "long_factor"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, [float(x) for x in getattr(self, name)])
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("rope_type", *ROPE_TYPES[self.rope_type]) and value != field.default:
                raise UserError(f"{field.name}={value} is no key of rope_type={self.rope_type}; leave it out")
        longrope = self.rope_type == "longrope"
        rules = [
            (self.factor < 1, f"{self}: expected factor >= 1"),
            (
                not 0 < self.low_freq_factor < self.high_freq_factor,
                f"{self}: expected 0 < low_freq_factor < high_freq_factor",
            ),
            (
                self.original_max_position_embeddings < 1 + longrope,
                f"{self}: expected original_max_position_embeddings > {int(longrope)}",
            ),
            (not 0 < self.beta_slow <= self.beta_fast, f"{self}: expected 0 < beta_slow <= beta_fast"),
            (
                self.attention_factor is not None and self.attention_factor <= 0,
                f"{self}: expected attention_factor > 0",
            ),
            (
                longrope and any(not x or min(x) <= 0 for x in (self.short_factor, self.long_factor)),
                f"{self}: longrope needs a short_factor and a long_factor above 0 for each pair",
            ),
        ]
        for broken, message in rules:
            if broken:
                raise UserError(message)

    @property
    def attention_scaling(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.rope_type not in ("yarn", "longrope") or self.attention_factor is not None:
            return 1.0 if self.attention_factor is None else self.attention_factor
        if self.rope_type == "longrope":
            original = math.log(self.original_max_position_embeddings)
            return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / original)
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor)

    @property
    def longest(self) -> int | None:
        """The longest sequence whose frequencies are those of every shorter one; None: of any length."""
        return self.original_max_position_embeddings if self.rope_type in BY_LENGTH else None

    def rules(self, pairs: int, longest: int):
        """(whether it is broken, what is said then), for `GPTModelConfig`.

        Args:
            pairs: of a head's channels that are rotated.
            longest: `model.encoder_seq_length`.
        """
        for name in ("short_factor", "long_factor"):
            given = getattr(self, name)
            yield (
                given is not None and len(given) != pairs,
                f"model.position_embedding.scaling.{name} has {len(given or ())} numbers for {pairs} rotated pairs: give one "
                "for each",
            )
        yield (
            self.longest is not None and longest > self.longest,
            f"model.position_embedding.scaling.rope_type={self.rope_type} turns sequences of more than {self.longest} tokens by "
            "other frequencies, and a prompt that shorter and longer responses share cannot have both: set "
            f"model.encoder_seq_length={longest} to at most {self.longest}",
        )

    def apply(self, frequencies: Tensor, base: float, dim: int) -> Tensor:
        """Frequencies of sequences up to `longest`: fp32 [pairs] -> fp32 [pairs].

        Args:
            frequencies: base ^ (-2 i / dim).
            dim: channels of a head that are rotated.
        """
        match self.rope_type:
            case "linear":
                return frequencies / self.factor
            case "dynamic":
                return frequencies
            case "longrope":
                return frequencies / torch.tensor(self.short_factor, dtype=frequencies.dtype, device=frequencies.device)
            case "yarn":
                kept = 1 - self._ramp(frequencies, base, dim)
            case _:
                waves = self.original_max_position_embeddings * frequencies / (2 * math.pi)  # per original length
                kept = ((waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies

    def _ramp(self, frequencies: Tensor, base: float, dim: int) -> Tensor:
        """Of each pair, 0 where it stays as it was and 1 where it is stretched (YaRN, equations 17 to 20)."""

        def pair_of(turns: float) -> float:  # that turns so often within the original length
            return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        pair = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
        return ((pair - low) / (high - low)).clamp(0, 1)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1 (YaRN, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
