"""config.json files as they are published, and what each says in our fields, by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import RopeScaling

__all__ = [
    "DEEPSEEK", "DEEPSEEK_V2", "GLM4_LITE", "LLAMA_31_8B", "MISTRAL_7B_01", "NAMELESS", "PUBLISHED", "QWEN25_05B", "QWEN25_7B",
    "QWEN25_7B_YARN", "QWEN3_06B", "TINY_LLAMA", "expected", "write",
]  # fmt: skip

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA_32_1B = LLAMA_31_8B | {
    "eos_token_id": 128001, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "rope_scaling": LLAMA_31_8B["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}  # fmt: skip
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
    "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
    "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
NAMELESS = TINY_LLAMA | {"architectures": None}
DEEPSEEK = TINY_LLAMA | {
    "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 22, "model_type": "deepseek_v3",
    "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
}  # fmt: skip
DEEPSEEK_V2 = DEEPSEEK | {"architectures": None, "model_type": "deepseek_v2", "num_experts_per_tok": 2}
GLM4_LITE = {key: value for key, value in DEEPSEEK.items() if key != "first_k_dense_replace"} | {
    "architectures": None, "model_type": "glm4_moe_lite",
}  # fmt: skip
# 2023: no rope_theta, no num_key_value_heads.
LLAMA_2_FIRST = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
    "vocab_size": 49152,
}  # fmt: skip
MISTRAL_7B_01 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MISTRAL_7B_03 = MISTRAL_7B_01 | {
    "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "transformers_version": "4.42.0.dev0",
    "vocab_size": 32768,
}  # fmt: skip
MISTRAL_NEMO = MISTRAL_7B_03 | {
    "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 131072, "num_hidden_layers": 40,
    "vocab_size": 131072,
}  # fmt: skip
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN25_7B = QWEN25_05B | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "sliding_window": 131072,
    "tie_word_embeddings": False, "vocab_size": 152064,
}  # fmt: skip
# As its model card says for more than 32768 tokens.
QWEN25_7B_YARN = QWEN25_7B | {
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN3_06B = QWEN3_8B | {
    "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28, "num_attention_heads": 16,
    "num_hidden_layers": 28, "tie_word_embeddings": True,
}  # fmt: skip

NO_EXPERTS = {
    "num_moe_experts": None, "moe_router_topk": 2, "moe_ffn_hidden_size": None, "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False, "moe_router_score_function": "softmax",
    "moe_router_norm_topk_prob": True, "moe_router_topk_scaling_factor": None, "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None, "moe_router_group_topk": None, "moe_router_group_best": None,
    "qk_layernorm_across_heads": False,
}  # fmt: skip


def expected(layers, hidden, heads, groups, head, ffn, vocab, length, tied, eps, base, **more):
    """Every field that is read, by hand."""
    scaling = more.pop("scaling", None)
    return NO_EXPERTS | {
        "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "attention_multiplier": None,
        "num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_query_groups": groups,
        "kv_channels": head, "ffn_hidden_size": ffn, "vocab_size": vocab, "encoder_seq_length": length,
        "share_embeddings_and_output_weights": tied, "layernorm_epsilon": eps, "add_qkv_bias": False,
        "qk_layernorm": False, "init_method_std": 0.02, "window_size": None, "window_attn_skip_freq": None,
        "add_bias_linear": False, "activation": "silu", "activation_func_clamp_value": None, "glu_linear_offset": 0.0,
        "attn_logit_softcapping": None, "vision": None, "no_rope_freq": None, "softmax_type": "vanilla",
        "multi_latent_attention": False, "q_lora_rank": None, "kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64,
        "v_head_dim": 128, "latent_layernorm_epsilon": None,
        "position_embedding": dataclasses.asdict(PositionEmbedding(base=base, scaling=scaling)),
    } | more  # fmt: skip


PUBLISHED = {
    "Llama-3.1-8B": (LLAMA_31_8B, expected(
        32, 4096, 32, 8, 128, 14336, 128256, 131072, False, 1e-5, 5e5, scaling=RopeScaling(8.0, 1.0, 4.0, 8192))),
    "Llama-3.2-1B": (LLAMA_32_1B, expected(
        16, 2048, 32, 8, 64, 8192, 128256, 131072, True, 1e-5, 5e5, scaling=RopeScaling(32.0, 1.0, 4.0, 8192))),
    "TinyLlama-1.1B": (TINY_LLAMA, expected(22, 2048, 32, 4, 64, 5632, 32000, 2048, False, 1e-5, 1e4)),
    "Llama-2-7B of 2023": (LLAMA_2_FIRST, expected(32, 4096, 32, 32, 128, 11008, 32000, 4096, False, 1e-5, 1e4)),
    "SmolLM2-135M": (SMOLLM2_135M, expected(
        30, 576, 9, 3, 64, 1536, 49152, 8192, True, 1e-5, 1e5, init_method_std=0.041666666666666664)),
    "Mistral-7B-v0.1": (MISTRAL_7B_01, expected(
        32, 4096, 32, 8, 128, 14336, 32000, 32768, False, 1e-5, 1e4, window_size=[4095, 0])),
    "Mistral-7B-v0.3": (MISTRAL_7B_03, expected(32, 4096, 32, 8, 128, 14336, 32768, 32768, False, 1e-5, 1e6)),
    "Mistral-Nemo": (MISTRAL_NEMO, expected(40, 5120, 32, 8, 128, 14336, 131072, 131072, False, 1e-5, 1e6)),
    "Qwen2.5-0.5B": (QWEN25_05B, expected(
        24, 896, 14, 2, 64, 4864, 151936, 32768, True, 1e-6, 1e6, add_qkv_bias=True)),
    "Qwen2.5-7B": (QWEN25_7B, expected(
        28, 3584, 28, 4, 128, 18944, 152064, 131072, False, 1e-6, 1e6, add_qkv_bias=True)),
    "Qwen2.5-7B with yarn": (QWEN25_7B_YARN, expected(
        28, 3584, 28, 4, 128, 18944, 152064, 131072, False, 1e-6, 1e6, add_qkv_bias=True,
        scaling=RopeScaling(4.0, original_max_position_embeddings=32768, rope_type="yarn"))),
    "Qwen3-8B": (QWEN3_8B, expected(36, 4096, 32, 8, 128, 12288, 151936, 40960, False, 1e-6, 1e6, qk_layernorm=True)),
    "Qwen3-0.6B": (QWEN3_06B, expected(28, 1024, 16, 8, 128, 3072, 151936, 40960, True, 1e-6, 1e6, qk_layernorm=True)),
}  # fmt: skip


def write(folder: Path, raw: dict) -> None:
    """As the folder's config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
