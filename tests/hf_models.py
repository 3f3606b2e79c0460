"""Small random models of the families that are read, made by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_ext.hf import read_hf_config
from megatron_ext.hf.export import MAX_SHARD_SIZE
from megatron_ext.hf.files import INDEX_FILE, plan_files
from megatron_ext.hf.mapping import hf_shapes

__all__ = ["FAMILY_CASES", "VOCAB", "hf_logits", "make_hf_model", "write_hollow_weights"]

VOCAB = 67  # no multiple of anything: rows are padded
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # attention far from uniform
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# (family, changes of SIZES, bytes of a shard).
FAMILY_CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 10**9),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, 20_000),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 6, "tie_word_embeddings": True}, 20_000),
    "mistral without window": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}, 10**9),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, 10**9),
    "qwen2 with windows": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, 20_000,
    ),
    "qwen3": ("qwen3", {"head_dim": 16}, 20_000),
    "qwen3 tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rope_theta": 1e6}, 10**9),
}  # fmt: skip


def make_hf_model(
    folder: Path, name: str, rng: torch.Generator, dtype: torch.dtype = torch.float32, **changes: Any
) -> None:
    """Write the model of a case with weights in which every term counts: norms around 1, biases not 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, own, shard = FAMILY_CASES[name]
    config = AutoConfig.for_model(family, **(SIZES | own | changes))
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
    model.save_pretrained(str(folder), max_shard_size=shard)


def write_hollow_weights(folder: Path) -> None:
    """Beside a config.json of any size the safetensors that belong to it: headers, and holes that take no disk."""
    shapes = hf_shapes(SimpleNamespace(**read_hf_config(folder)))
    slots, beginnings = plan_files(shapes, torch.bfloat16, MAX_SHARD_SIZE)
    index = {"weight_map": {name: slot.file for name, slot in slots.items()}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    for name, beginning in beginnings.items():
        with open(folder / name, "wb") as file:
            file.write(beginning)
            file.truncate(max(slot.start + slot.size for slot in slots.values() if slot.file == name))


@torch.no_grad()
def hf_logits(folder: Path, texts: list[list[int]]) -> list[torch.Tensor]:
    """What transformers computes, fp32 [tokens, v] for each text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager").eval()
    return [model(torch.tensor([text])).logits[0] for text in texts]
