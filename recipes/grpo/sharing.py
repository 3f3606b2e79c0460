"""What of a group's tokens is encoded once: its prompt, beginnings that its responses have in common, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.flops import LEAST_SPEEDUP, ModelShape, ideal_speedup, model_flops, sharing_pays
from megatron_ext.prefix_tree import PrefixTree
from recipes.grpo.rollouts import Rollouts
from recipes.grpo.settings import GRPOModel

__all__ = ["Shared", "Sharing"]

logger = logging.getLogger(__name__)

# Tokens of a beginning that "auto" shares: shorter ones deepen the tree by chance.
LEAST_SHARED = 8


@dataclass(frozen=True)
class Shared:
    """
    Attributes:
        prefix: the prompt.
        beginnings: what responses have in common, from this many tokens on; None: nothing.
    """

    prefix: bool
    beginnings: int | None = None


class Sharing:
    """model.prefix_grouping and model.min_shared_tokens, and for "auto" what counting operations promises. A choice that changes
    is logged."""

    def __init__(self, model: GRPOModel):
        self.model, self.shape = model, ModelShape.of(model)
        self._last: Shared | None = None

    def of(self, rollouts: Rollouts, groups: Sequence[int]) -> Shared:
        """Of these groups."""
        prefix, beginnings = self.model.prefix_grouping, self.model.min_shared_tokens
        if prefix is False:
            return Shared(False)
        if isinstance(beginnings, int):
            return Shared(True, beginnings)
        lengths = rollouts.lengths(groups)
        shared = Shared(sharing_pays(self.shape, lengths) if prefix == "auto" else True)
        times = ideal_speedup(self.shape, lengths)
        if beginnings == "auto" and any(t.turns > 1 for g in groups for t in rollouts.trajectories[g]):
            trees = model_flops(self.shape, [_tree(rollouts, g) for g in groups], True).total
            without = model_flops(self.shape, lengths, shared.prefix).total
            if without >= LEAST_SPEEDUP * trees:
                shared, times = Shared(True, LEAST_SHARED), model_flops(self.shape, lengths, False).total / trees
        if shared != self._last and (prefix == "auto" or shared.beginnings or self._last is not None):
            logger.info(
                "prefix grouping is %s%s: counting operations it is %.2f times as fast",
                "on" if shared.prefix else "off",
                f", trees of what responses share from {shared.beginnings} tokens on" if shared.beginnings else "",
                times,
            )
        self._last = shared
        return shared


def _tree(rollouts: Rollouts, group: int) -> PrefixTree:
    prompt = rollouts.prompts[group].tokens
    sequences = [[*prompt, *trajectory.tokens] for trajectory in rollouts.trajectories[group]]
    return PrefixTree.from_token_lists(sequences, len(prompt), LEAST_SHARED)
