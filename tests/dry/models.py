"""Kinds of layers that steps are taken with: changes to `small_config`, for tests/dry/steps.py."""

from __future__ import annotations

from megatron_ext.adapters import LoraConfig
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import RopeScaling
from tests.gpt_cases import LATENT

__all__ = [
    "DEEPSEEK",
    "EXPERTS",
    "EYES",
    "GPT_OSS",
    "LATENT_LORA",
    "LATENT_ROWS",
    "LONG",
    "LORA",
    "OTHER_KEYS",
    "SINKS",
    "WINDOW",
]

EYES = {"freeze_vision_model": False}
WINDOW = {"window_size": [6, 0], "window_attn_skip_freq": 2}
LATENT_ROWS = LATENT | {
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "latent_layernorm_epsilon": 1e-6,
}  # kernels want multiples of 8
SINKS = {"softmax_type": "learnable", "no_rope_freq": 2}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16}
DEEPSEEK = EXPERTS | {
    "moe_layer_freq": [0, 1], "moe_router_topk": 1, "moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True,
    "moe_router_score_function": "sigmoid", "moe_router_norm_topk_prob": False, "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.1, "moe_router_num_groups": 2,
    "moe_router_group_topk": 1, "moe_router_group_best": 2, "moe_aux_loss_coeff": 0.1,
}  # fmt: skip
GPT_OSS = EXPERTS | {"softmax_type": "learnable"} | {
    "add_bias_linear": True, "activation": "quick_gelu", "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0,
}  # fmt: skip
OTHER_KEYS = {  # that no other model here has: multipliers as Granite's, norms across heads, rotation of half a head, ...
    "embedding_multiplier": 12.0, "residual_multiplier": 0.2, "logits_scaling": 8.0, "attention_multiplier": 0.1,
    "make_vocab_size_divisible_by": 32, "logprob_chunk_size": 5,
    "qk_layernorm_across_heads": True, "share_embeddings_and_output_weights": False, "layernorm_epsilon": 1e-6,
    "position_embedding": PositionEmbedding(percent=0.5, base=1e6, scaling=RopeScaling(4.0, original_max_position_embeddings=32)),
}  # fmt: skip
LONG = {
    "position_embedding": PositionEmbedding(
        scaling=RopeScaling(
            4.0, original_max_position_embeddings=128, rope_type="longrope", attention_factor=1.2, short_factor=[1.0] * 4,
            long_factor=[2.0] * 4,
        )
    ),
}  # fmt: skip
LORA = {
    "peft": LoraConfig(
        dim=4, alpha=8.0, rslora=True, target_modules=["linear_qkv", "linear_proj", "gate_proj", "linear_fc2"]
    )
}
LATENT_LORA = LATENT_ROWS | {
    "peft": LoraConfig(
        dim=4, target_modules=["linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj"]
    )
}
