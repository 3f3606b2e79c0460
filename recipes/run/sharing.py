"""What sequences that begin alike encode once: as the configuration says, and for "auto" as counting operations promises."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ext.flops import LEAST_SPEEDUP, Lengths, ModelShape, ideal_speedup, model_flops, sharing_pays
from megatron_ext.prefix_tree import PrefixTree
from recipes.run.settings import GroupedModel

__all__ = ["LEAST_SHARED", "Shared", "SharingChoice"]

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


class SharingChoice:
    """model.prefix_grouping and model.min_shared_tokens, and for "auto" what counting operations promises. A choice that changes
    is logged.

    Args:
        often: it may change with every step; then each choice is logged the first time.
    """

    def __init__(self, model: GroupedModel, often: bool = False):
        self.model, self.shape, self.often = model, ModelShape.of(model), often
        self._last: Shared | None = None
        self._logged: set[Shared] = set()

    def shares_prompts(self, lengths: Lengths) -> bool:
        """Whether prompts of groups are encoded once.

        Args:
            lengths: (prompt length, [response lengths]) of each.
        """
        prefix = self.model.prefix_grouping
        return sharing_pays(self.shape, lengths) if prefix == "auto" else prefix

    def choose(
        self,
        lengths: Lengths,
        trees: Callable[[], Sequence[PrefixTree]] | None = None,
        shares_prompts: bool | None = None,
    ) -> Shared:
        """
        Args:
            lengths: (prompt length, [response lengths]) of each group.
            trees: gives the same sequences as trees of what they share from `LEAST_SHARED` tokens on; None: they are not worth a
                look.
            shares_prompts: what has been chosen for more than these groups; None: it is chosen here.
        """
        prefix, beginnings = self.model.prefix_grouping, self.model.min_shared_tokens
        if prefix is False:
            return Shared(False)
        if isinstance(beginnings, int):
            return Shared(True, beginnings)
        shared = Shared(self.shares_prompts(lengths) if shares_prompts is None else shares_prompts)
        times = ideal_speedup(self.shape, lengths)
        if beginnings == "auto" and trees is not None:
            with_trees = model_flops(self.shape, trees(), True).total
            without = model_flops(self.shape, lengths, shared.prefix).total
            if without >= LEAST_SPEEDUP * with_trees:
                shared = Shared(True, LEAST_SHARED)
                times = model_flops(self.shape, lengths, False).total / with_trees
        new = shared not in self._logged if self.often else shared != self._last
        if new and (prefix == "auto" or shared.beginnings or self._last is not None):
            logger.info(
                "prefix grouping is %s%s: counting operations it is %.2f times as fast",
                "on" if shared.prefix else "off",
                f", trees of what responses share from {shared.beginnings} tokens on" if shared.beginnings else "",
                times,
            )
        self._last = shared
        self._logged.add(shared)
        return shared
