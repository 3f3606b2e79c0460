"""Small random models of the families that are read, made by transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.hf import read_hf_config
from megatron_ext.hf.export import MAX_SHARD_SIZE
from megatron_ext.hf.files import INDEX_FILE, plan_files
from megatron_ext.hf.mapping import hf_shapes
from tests.edges import Edges

__all__ = [
    "EXPERT_CASES",
    "FAMILY_CASES",
    "VOCAB",
    "all_in_fp64",
    "clear_text",
    "hf_logits",
    "make_clear_hf_model",
    "make_hf_model",
    "published_gradients",
    "write_hollow_weights",
]

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
YARN = {"rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}  # fmt: skip
ROUTED_V2 = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
# (family, changes of SIZES, bytes of a shard).
FAMILY_CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 10**9),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, 20_000),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 6, "tie_word_embeddings": True}, 20_000),
    "mistral without window": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}, 10**9),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": YARN}, 10**9),
    "qwen2 with windows": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, 20_000,
    ),
    "qwen3": ("qwen3", {"head_dim": 16}, 20_000),
    "ministral": (
        "ministral",
        {
            "head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "tie_word_embeddings": True,
        },
        10**9,
    ),
    "smollm3": ("smollm3", {"pad_token_id": None}, 20_000),
    # Transformers gives the embedding of padding, here a token like others, no gradient.
    "seed_oss": ("seed_oss", {"head_dim": 16, "pad_token_id": None}, 10**9),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 0.7, "attention_multiplier": 0.2,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
        20_000,
    ),
    "deepseek_v3, dense": (
        "deepseek_v3",
        LATENT
        | {
            "first_k_dense_replace": 4, "num_nextn_predict_layers": 0,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
        },
        20_000,
    ),
    "deepseek_v3, queries as they are": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8,
            "v_head_dim": 12, "first_k_dense_replace": 4, "num_nextn_predict_layers": 0, "rope_interleave": False,
        },
        10**9,
    ),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "mlp_only_layers": [0], "norm_topk_prob": True} | SPARSE, 20_000),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 6, "tie_word_embeddings": True}, 20_000),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 2} | SPARSE, 20_000),
    "olmoe": ("olmoe", {"pad_token_id": None, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}, 20_000),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT
        | ROUTED
        | {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
        20_000,
    ),
    "deepseek_v3, one group": ("deepseek_v3", LATENT | ROUTED | {"first_k_dense_replace": 0, "norm_topk_prob": False}, 10**9),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT
        | ROUTED_V2
        | {
            "topk_method": "group_limited_greedy", "n_routed_experts": 8, "n_group": 4, "topk_group": 3,
            "routed_scaling_factor": 3.0, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
        20_000,
    ),
    "deepseek_v2, greedy": (
        "deepseek_v2", LATENT | ROUTED_V2 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5}, 10**9,
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {key: value for key, value in (LATENT | ROUTED).items() if key != "first_k_dense_replace"}
        | {"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]},
        20_000,
    ),
    "youtu": ("youtu", LATENT | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, 10**9),
    "glm4_moe": ("glm4_moe", {"head_dim": 16, "attention_bias": True, "use_qk_norm": True} | ROUTED, 20_000),
    "glm4_moe, plain": (
        "glm4_moe",
        ROUTED
        | {
            "tie_word_embeddings": True, "first_k_dense_replace": 3, "n_shared_experts": 3, "routed_scaling_factor": 1.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
        10**9,
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.5},
        10**9,
    ),
    "qwen3 tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rope_theta": 1e6}, 10**9),
}  # fmt: skip
EXPERT_CASES = ("qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "deepseek_v2", "glm4_moe", "gpt_oss")
# Mixtral's names for tensors as transformers 5 holds them, and as they are published.
MIXTRAL_NAMES = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


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
            for name, parameter in model.named_parameters():
                if name.endswith("_proj_bias"):
                    parameter.copy_(0.3 * torch.randn(parameter.shape))
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(0.3 * torch.randn(buffer.shape))
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


def make_clear_hf_model(
    folder: Path, name: str, rng: torch.Generator, texts: list[list[int]], **changes: Any
) -> list[torch.Tensor]:
    """One by which no token of the texts takes its experts by a hair, so that rounding chooses none; gives their logits."""
    while True:
        make_hf_model(folder, name, rng, **changes)
        with Edges("topk") as edges:
            logits = hf_logits(folder, texts)
        if edges.clear:
            return logits


def clear_text(folder: Path, rng: torch.Generator, length: int) -> tuple[list[int], torch.Tensor]:
    """A random text of which no token takes its experts by a hair, and its logits."""
    while True:
        text = torch.randint(VOCAB, (length,), generator=rng).tolist()
        with Edges("topk") as edges:
            (logits,) = hf_logits(folder, [text])
        if edges.clear:
            return text, logits


@contextmanager
def all_in_fp64() -> Iterator[None]:
    """What is computed in fp32 in any precision, positions' angles and transformers' norms and softmax, is now in fp64."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def published_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of a model of transformers, by the names of published tensors; zeros where there is none."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        layer, _, packed = name.partition("experts.")
        if packed not in ("gate_up_proj", "down_proj") or model.config.model_type == "gpt_oss":  # published so
            found[name] = gradient
            continue
        for number, of_expert in enumerate(gradient):
            parts = dict(zip(("gate_proj", "up_proj"), of_expert.chunk(2), strict=True))
            for part, value in (parts if packed == "gate_up_proj" else {packed: of_expert}).items():
                found[f"{layer}experts.{number}.{part}.weight"] = value
    if model.config.model_type == "mixtral":
        for ours, theirs in MIXTRAL_NAMES.items():
            found = {name.replace(ours, theirs): value for name, value in found.items()}
    return found
