"""A model, a job and a machine that the planner's tests take."""

from __future__ import annotations

from megatron_ext.models import GPTModelConfig
from megatron_ext.planner import Assumptions, Hardware, Job

__all__ = ["PERFECT", "ROUND", "job", "model"]

# 1 PFLOP/s, 1 TB/s of memory and within a node, 100 GB/s out of it.
ROUND = Hardware("round", 1e15, 1e15, 1e12, 1e12, 1e11, 1e10, "made up")
PERFECT = Assumptions(
    linear_efficiency=1.0,
    attention_efficiency=1.0,
    memory_efficiency=1.0,
    link_efficiency=1.0,
    collective_latency=0.0,
    ring_latency=0.0,
    kernel_launch=0.0,
)


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
