"""What of a group's tokens is encoded once: its prompt, beginnings that its responses have in common, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.prefix_tree import PrefixTree
from recipes.grpo.rollouts import Rollouts
from recipes.run.sharing import LEAST_SHARED, Shared, SharingChoice

__all__ = ["Sharing"]


class Sharing(SharingChoice):
    """Of rollouts. Trees are looked at where responses have several turns."""

    def of(self, rollouts: Rollouts, groups: Sequence[int]) -> Shared:
        """Of these groups."""
        turns = any(t.turns > 1 for g in groups for t in rollouts.trajectories[g])
        trees = (lambda: [_tree(rollouts, g) for g in groups]) if turns else None
        return self.choose(rollouts.lengths(groups), trees)


def _tree(rollouts: Rollouts, group: int) -> PrefixTree:
    prompt = rollouts.prompts[group].tokens
    sequences = [[*prompt, *trajectory.tokens] for trajectory in rollouts.trajectories[group]]
    return PrefixTree.from_token_lists(sequences, len(prompt), LEAST_SHARED)
