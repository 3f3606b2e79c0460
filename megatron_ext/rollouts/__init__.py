"""Rollouts: requests in, trajectories out, token ids only; sources that answer them, our own sampler first."""

from megatron_ext.rollouts.requests import Request, SamplingParams, TokenEnvironment
from megatron_ext.rollouts.sampler import MegatronSource
from megatron_ext.rollouts.source import Source
from megatron_ext.rollouts.trajectories import FinishReason, Passage, Trajectory, last_turn

__all__ = [
    "FinishReason", "MegatronSource", "Passage", "Request", "SamplingParams", "Source", "TokenEnvironment", "Trajectory",
    "last_turn",
]  # fmt: skip
