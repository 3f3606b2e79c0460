"""The seam between what samples and what trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_ext.rollouts.requests import Request
from megatron_ext.rollouts.trajectories import Trajectory

__all__ = ["Source"]


class Source(Protocol):
    """Whatever answers requests with trajectories: our sampler on the training weights, a server, a file.

    Every rank of a model-parallel group calls with the same arguments and gets the same answers.
    """

    def sample(self, requests: Sequence[Request]) -> list[list[Trajectory]]:
        """For each request its samples, in order.

        Raises:
            UserError: a request that cannot be answered, before any is.
        """
        ...

    def update_weights(self, version: int) -> None:
        """The weights have had `version` updates: what is sampled from now on is theirs."""
        ...
