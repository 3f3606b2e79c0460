"""What the YAML may say of rewards, beside which ones they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from recipes.cli.config import ConfigError

__all__ = ["ON_TIMEOUT", "RewardLimits", "RewardSection"]

ON_TIMEOUT = ("refuse", "zero", "drop")


@dataclass
class RewardSection:
    # One of several rewards, as trainer.grpo.reward.
    reward: Any
    # Factor of its values in the sum.
    weight: float = 1.0
    # It scores rows with one of these in data_source; null: all rows.
    data_sources: list[str] | None = None

    def __post_init__(self):
        if not math.isfinite(self.weight):
            raise ConfigError(f"trainer.grpo.rewards: weight={self.weight} must be finite")
        if self.data_sources == []:
            raise ConfigError("trainer.grpo.rewards: data_sources=[] scores no row; name some, or leave it out for all")


@dataclass(frozen=True)
class RewardLimits:
    """How long rewards may take, and what becomes of a response that one does not score in time.

    Attributes:
        timeout: seconds for one call, of the responses to one prompt.
        on_timeout: "refuse", "zero" or "drop".
        processes: that rewards are asked in.

    Raises:
        ConfigError: anything else.
    """

    timeout: float = 60.0
    on_timeout: str = "refuse"
    processes: int = 1

    def __post_init__(self):
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"trainer.grpo.reward_timeout={self.timeout} must be a positive number of seconds")
        if self.on_timeout not in ON_TIMEOUT:
            raise ConfigError(
                f"trainer.grpo.on_reward_timeout={self.on_timeout} must be one of {', '.join(ON_TIMEOUT)}"
            )
        if self.processes < 1:
            raise ConfigError(f"trainer.grpo.reward_processes={self.processes} must be at least 1")
