"""Weights that are told to all data-parallel ranks while other work is done: `model.optim.overlap_param_gather`.

After a step of the distributed optimizer each rank has new weights of its own share alone. Megatron's hooks make every module
wait for its weights before it is called, wherever it is called: in training, scoring, sampling. Two things are ours. All gathers
are started at once after the step, in the order in which a forward pass wants them: left to the hooks, a rank whose stream has
no medium would start them in another order than one whose has, and what ranks tell each other would be mixed up. And whoever
reads or writes weights without calling their module must wait for them: `await_weight`, `Engine.gather_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

__all__ = ["WeightGather", "await_weight"]

WAIT = "await_gather"  # of a parameter: waits until it is whole


class WeightGather:
    """
    Args:
        pieces: of this rank's stage, each in its DDP, with whole weights.
    """

    def __init__(self, pieces: Sequence[DistributedDataParallel]):
        # Buckets are in the order in which gradients are ready. Those of experts lie over ranks of their own, and are told last.
        self.groups = [group for piece in pieces for group in reversed(piece.bucket_groups)]
        self.groups += [group for piece in pieces for group in reversed(piece.expert_parallel_bucket_groups)]
        for piece in pieces:
            for parameter, group in piece.param_to_bucket_group.items():
                setattr(parameter, WAIT, lambda group=group: group.finish_param_sync(skip_next_bucket_dispatch=True))
        self.nothing_to_gather()

    def nothing_to_gather(self) -> None:
        """Weights are whole, whatever Megatron believes: it takes each sum of gradients for the announcement of a step."""
        for group in self.groups:
            group.param_gather_dispatched = True

    def start(self) -> None:
        """After a step; every rank calls it."""
        for group in self.groups:
            group.start_param_sync()

    def finish(self) -> None:
        """Wait until all weights are whole."""
        for group in self.groups:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def await_weight(weight: Tensor) -> Tensor:
    """The same weight, whole. For weights that are used without a call of their module."""
    if wait := getattr(weight, WAIT, None):
        wait()
    return weight
