"""Objectives with a ratio that is clipped (keys of `trainer.grpo.objective`):

    l_i = -min(rho_i A_i, clip(rho_i, 1 - ratio_clip_min, 1 + ratio_clip_max) A_i)

and, with ratio_max = c (dual clip, arXiv 1912.09729), where A_i < 0 at most -c A_i: a response that is bad and has become far
likelier than it was pulls no harder than c times its advantage.

| name | source | ratio | clip | normalisation | advantages | overlong responses |
|---|---|---|---|---|---|---|
| grpo | DeepSeekMath, arXiv 2402.03300, eq. 3 | token | 0.2, 0.2 | token (the paper: sequence) | group | trained |
| dapo | arXiv 2503.14476, eq. 8 | token | 0.2, 0.28 | token | group | left out |
| dr_grpo | arXiv 2503.20783, section 3.2 | token | 0.2, 0.2 | constant | group_mean | trained |
| dual_clip | arXiv 1912.09729, with groups | token, at most 3 where A < 0 | 0.2, 0.2 | token | group | trained |
| gspo | arXiv 2507.18071, eq. 5 and section 5.1 | sequence | 0.0003, 0.0004 | sequence | group | trained |

rho_i is pi(y_i) / pi_old(y_i), of a token; or the geometric mean of those over the response (`sequence_level_ratios`). It is
exactly 1 where one optimizer step follows a batch, so log-probabilities of the policy that sampled need no pass of their own
in any of them.

Shape legend: r predicted response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.kl import bounded_exp
from megatron_ext.losses.objective import Objective, PolicyTokens

__all__ = ["Dapo", "DrGrpo", "DualClip", "Grpo", "Gspo"]


@dataclass(frozen=True, kw_only=True)
class Grpo(Objective):
    """Group relative policy optimisation with every option of the family. See the module's formula and table."""

    # How far below and above 1 the ratio of probabilities counts.
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    # c: the largest ratio that counts where the advantage is negative; null: none.
    ratio_max: float | None = None
    # One ratio per response.
    sequence_level_ratios: bool = False

    def __post_init__(self):
        super().__post_init__()
        low, high = self.ratio_clip_min, self.ratio_clip_max
        if not 0 <= low < 1 or not high >= 0:
            raise UserError(f"ratio_clip_min={low} must lie in [0, 1) and ratio_clip_max={high} must not be negative")
        if low >= 0.5 and high >= 1:
            raise UserError(
                f"ratio_clip_min={low} and ratio_clip_max={high} look like the bounds of the ratio: they are its distances "
                f"from 1, so give {1 - low:.4g} and {high - 1:.4g}"
            )
        if self.ratio_max is not None and not 1 + high < self.ratio_max < math.inf:
            raise UserError(
                f"ratio_max={self.ratio_max} must be finite and above 1 + ratio_clip_max = {1 + high:.4g}: it bounds ratios that "
                "clipping leaves alone"
            )

    def policy_loss(self, tokens: PolicyTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.policy_loss`. "clip_fraction": the share of tokens that clipping took the gradient from."""
        log_ratio = tokens.sequence_log_ratio() if self.sequence_level_ratios else tokens.log_ratio
        ratio, advantages, weights = bounded_exp(log_ratio), tokens.advantages, tokens.weights
        clipped = ratio.clamp(1 - self.ratio_clip_min, 1 + self.ratio_clip_max) * advantages
        plain, stopped = ratio * advantages, ratio * advantages > clipped
        if self.ratio_max is not None:
            plain = ratio.clamp(max=self.ratio_max) * advantages
            stopped = stopped | ((ratio > self.ratio_max) & (advantages < 0))
        metrics = {"ratio": (weights * ratio).sum(), "clip_fraction": (weights * stopped).sum()}
        return -torch.minimum(plain, clipped), metrics


@dataclass(frozen=True, kw_only=True)
class Dapo(Grpo):
    """Decoupled clip: unlikely tokens of good responses may grow further than 1.2 times. Token level; responses cut off at
    max_length teach nothing (`trainer.grpo.overlong_filtering`), and the last fifth of that length costs up to 1 of the reward
    (`trainer.grpo.overlong_buffer`, 4,096 of 20,480 in the paper). Groups without signal are sampled anew
    (`trainer.grpo.max_sampling_rounds`; the paper has no limit)."""

    FIXED: ClassVar[Mapping[str, Any]] = {"normalisation": "token", "sequence_level_ratios": False}
    FILTERS_OVERLONG: ClassVar[bool] = True
    OVERLONG_BUFFER: ClassVar[float] = 0.2
    SAMPLING_ROUNDS: ClassVar[int] = 10

    ratio_clip_max: float = 0.28


@dataclass(frozen=True, kw_only=True)
class DrGrpo(Grpo):
    """GRPO done right: neither the length of responses nor the standard deviation of a group weighs its tokens."""

    FIXED: ClassVar[Mapping[str, Any]] = {
        "normalisation": "constant",
        "advantages": "group_mean",
        "sequence_level_ratios": False,
    }

    normalisation: str = "constant"
    advantages: str | dict[str, Any] = "group_mean"


@dataclass(frozen=True, kw_only=True)
class DualClip(Grpo):
    """GRPO whose ratio is bounded where the advantage is negative, too."""

    ratio_max: float | None = 3.0

    def __post_init__(self):
        super().__post_init__()
        if self.ratio_max is None:
            raise UserError("ratio_max=null contradicts dual_clip: give the largest ratio, or name grpo")


@dataclass(frozen=True, kw_only=True)
class Gspo(Grpo):
    """Group sequence policy optimisation: ratio, clip and weight are those of whole responses. See
    `PolicyTokens.sequence_log_ratio`."""

    FIXED: ClassVar[Mapping[str, Any]] = {"normalisation": "sequence", "sequence_level_ratios": True}

    ratio_clip_min: float = 3e-4
    ratio_clip_max: float = 4e-4
    sequence_level_ratios: bool = True
    normalisation: str = "sequence"
