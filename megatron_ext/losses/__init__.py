"""Objectives as pure functions of tensors, and log-probabilities over a tensor-parallel vocabulary."""

from megatron_ext.losses.grpo import GrpoTerms, group_advantages, grpo_loss, token_weights
from megatron_ext.losses.logprobs import vocab_parallel_logprobs

__all__ = ["GrpoTerms", "group_advantages", "grpo_loss", "token_weights", "vocab_parallel_logprobs"]
