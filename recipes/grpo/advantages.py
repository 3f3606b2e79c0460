"""What a step's rewards are worth to training: its advantages, which may ask those of all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.losses.advantages import groups_with_signal
from megatron_ext.losses.overlong import overlong_penalty
from megatron_ext.runtime.collectives import gather_rows
from recipes.grpo.choices import get_advantages, takes_each_reward
from recipes.grpo.settings import GRPOSettings

__all__ = ["AdvantageMaker"]


class AdvantageMaker:
    """
    Args:
        weights: of each reward, as they stand in what is found.
        environments: whether theirs stands behind them; its weight is 1.
        data_ranks: whose prompts make up a step.
    """

    def __init__(
        self, settings: GRPOSettings, weights: Sequence[float], environments: bool, data_ranks: dist.ProcessGroup
    ):
        self.settings, self.data_ranks = settings, data_ranks
        self._each, self._of = takes_each_reward(settings.chosen), get_advantages(settings.chosen)
        weights = [*weights, 1.0] if environments else [*weights]
        # Column -> weight; where none has one there is nothing but the reward, which is 0.
        self._weights = {2 + i: w for i, w in enumerate(weights) if w} or {0: 1.0}

    def counted(self, found: Tensor) -> Tensor:
        """What advantages are made of, [prompts, samples, 1 and more]: the reward alone, or each that has a weight, which is 0
        for a row that it does not score; NaN where the reward is not known.

        Args:
            found: fp64 [prompts, samples, 1 and more], as `RolloutSampler.rewarded` has it.
        """
        total = found[..., :1]
        if not self._each:
            return total
        each = torch.stack([found[..., column] for column in self._weights], -1)
        return each.nan_to_num(0.0).where(~total.isnan(), total)

    def has_signal(self, found: Tensor) -> Tensor:
        """bool [prompts]: whether something in the group differs that advantages are made of. Arguments as `counted`."""
        return groups_with_signal(self.counted(found))

    def advantages(self, found: Tensor, lengths: Tensor) -> tuple[Tensor, list[bool]]:
        """fp64 [prompts, samples] of this data-parallel rank; and which groups are dropped, because a reward is not known: they
        have advantages of 0, and no others ask them. Every data-parallel rank calls it, with as many prompts.

        Args:
            found: as `counted` takes it.
            lengths: fp64 [prompts, samples], of responses.
        """
        settings, group = self.settings, self.data_ranks
        penalty = overlong_penalty(lengths, settings.length_params.max_length, settings.overlong_buffer)[..., None]
        counted = self.counted(found)
        # A further reward where each is heard apart.
        counted = torch.cat((counted, penalty), -1) if self._each else counted + penalty
        everybodys = gather_rows(counted, group)
        mine = slice(group.rank() * len(found), (group.rank() + 1) * len(found))
        if settings.on_reward_timeout != "drop":
            return self._made(everybodys)[mine], []
        lacks = everybodys.isnan().flatten(1).any(1)
        advantages = everybodys.new_zeros(everybodys.shape[:2])
        if not lacks.all():
            advantages[~lacks] = self._made(everybodys[~lacks])
        return advantages[mine], lacks[mine].tolist()

    def _made(self, counted: Tensor) -> Tensor:
        """fp64 [prompts, samples] of the whole step."""
        if self._each:
            found = self._of(counted, counted.new_tensor([*self._weights.values(), 1.0]))
        else:
            found = self._of(counted[..., 0])
        if found.shape != (shape := counted.shape[:2]):
            raise UserError(
                f"trainer.grpo.objective.advantages={self.settings.objective['advantages']} gave {tuple(found.shape)} for "
                f"rewards of {tuple(shape)}: it must give one for each"
            )
        return found.double()
