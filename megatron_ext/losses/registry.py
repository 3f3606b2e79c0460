"""Objectives and advantages by name; one of one's own is named by its dotted path."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_ext.losses.advantages import (
    batch_advantages,
    gdpo_advantages,
    gpg_advantages,
    group_advantages,
    group_mean_advantages,
    leave_one_out_advantages,
    reinforce_advantages,
    reinforce_baseline_advantages,
)
from megatron_ext.losses.cispo import Cispo
from megatron_ext.losses.clipped import Dapo, DrGrpo, DualClip, Grpo, Gspo
from megatron_ext.losses.gpg import Gpg
from megatron_ext.losses.objective import Objective
from megatron_ext.losses.sapo import Sapo

__all__ = ["ADVANTAGES", "OBJECTIVES"]

OBJECTIVES: dict[str, type[Objective]] = {
    "grpo": Grpo,
    "dapo": Dapo,
    "dr_grpo": DrGrpo,
    "dual_clip": DualClip,
    "gspo": Gspo,
    "cispo": Cispo,
    "sapo": Sapo,
    "gpg": Gpg,
}
ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "group": group_advantages,
    "group_mean": group_mean_advantages,
    "leave_one_out": leave_one_out_advantages,
    "batch": batch_advantages,
    "reinforce_plus_plus": reinforce_advantages,
    "reinforce_plus_plus_baseline": reinforce_baseline_advantages,
    "gpg": gpg_advantages,
    "gdpo": gdpo_advantages,
}
