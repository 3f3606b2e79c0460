"""A model and a job that the planner's tests take."""

from __future__ import annotations

from megatron_ext.models import GPTModelConfig
from megatron_ext.planner import Job

__all__ = ["job", "model"]


def model(**changes) -> GPTModelConfig:
    """A Llama of 1.2 billion parameters."""
    fields = {
        "num_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 8192,
        "vocab_size": 128256,
        "precision": "bf16",
    }
    return GPTModelConfig(**(fields | changes))


def job(model_changes: dict | None = None, **changes) -> Job:
    fields = {
        "nodes": 1,
        "devices": 8,
        "groups": 64,
        "prompt": 1024,
        "response": 256,
        "samples": 8,
        "scoring_passes": 2,
        "reference_copy": True,
        "rollout": True,
        "rollout_tokens": 8 * (1024 + 8 * 256),
    }
    return Job(model(**(model_changes or {})), **(fields | changes))
