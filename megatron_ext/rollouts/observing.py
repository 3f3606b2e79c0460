"""Environments of sampled responses: asked once for all ranks of a model-parallel group, several of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron.core import parallel_state

from megatron_ext.rollouts.responses import Response
from megatron_ext.runtime.collectives import broadcast_object, together
from megatron_ext.runtime.progress import PROGRESS

__all__ = ["THREADS", "begin", "observe"]

# Of environments that are asked at once: they may wait for tools of theirs.
THREADS = ThreadPoolExecutor(32, "environments")


def begin(responses: Sequence[Sequence[Response]]) -> None:
    """Tell the environments of the requests that trajectories of theirs begin."""
    with_one = [response for group in responses for response in group if response.request.environment is not None]
    _on_first(lambda r: r.request.environment.begin(r.sample), with_one)


def observe(responses: Sequence[Response]) -> None:
    """What the environments of responses answer to their turns.

    Raises:
        UserError: of an environment; on every rank.
    """
    answers = _on_first(lambda r: r.request.environment.observe(r.sample, r.passages(None)), responses)
    for response, tokens in zip(responses, answers, strict=True):
        response.observe(tokens)


def _on_first(ask: Callable[[Response], Any], responses: Sequence[Response]) -> list[Any]:
    """For each response what the first rank of the model-parallel group is told."""
    if not responses:
        return []
    group = parallel_state.get_model_parallel_group()
    answers = None
    with together(group):
        if group.rank() == 0:
            with PROGRESS.bounded():  # each call has its limit
                answers = list(THREADS.map(ask, responses))
    return broadcast_object(answers, 0, group)
