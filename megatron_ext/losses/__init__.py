"""Objectives as pure functions of tensors, and log-probabilities over a tensor-parallel vocabulary."""

from megatron_ext.losses.advantages import each_reward, group_advantages
from megatron_ext.losses.grpo import GrpoTerms, grpo_loss
from megatron_ext.losses.logprobs import vocab_parallel_logprobs
from megatron_ext.losses.objective import Objective, PolicyTokens, token_weights
from megatron_ext.losses.registry import ADVANTAGES, OBJECTIVES

__all__ = [
    "ADVANTAGES", "OBJECTIVES", "GrpoTerms", "Objective", "PolicyTokens", "each_reward", "group_advantages", "grpo_loss",
    "token_weights", "vocab_parallel_logprobs",
]  # fmt: skip
