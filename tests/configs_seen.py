"""What transformers reads in a config.json, in our fields."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_ext.hf.families import FAMILIES
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import ROPE_TYPES, RopeScaling
from tests.published_configs import expected

__all__ = ["seen_by_transformers"]

LATENT = ("deepseek_v3", "deepseek_v2", "glm4_moe_lite", "youtu")


def seen_by_transformers(folder: Path) -> dict:
    """Every field that is read, out of transformers' own configuration object."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder))
    rope = config.rope_parameters
    scaling, kind = None, rope["rope_type"]
    if kind != "default" and (kind, rope.get("factor")) != ("linear", 1):
        more = {"original_max_position_embeddings": config.max_position_embeddings} if kind == "dynamic" else {}
        keys = {key: rope[key] for key in ROPE_TYPES[kind] if rope.get(key) is not None}
        if kind in ("yarn", "longrope"):
            keys.setdefault("factor", config.max_position_embeddings / rope["original_max_position_embeddings"])
        scaling = RopeScaling(rope_type=kind, **keys | more)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    slides = [t == "sliding_attention" for t in getattr(config, "layer_types", None) or []] or [
        True
    ] * config.num_hidden_layers
    slides = [s and window is not None for s in slides]
    return expected(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head,
        config.intermediate_size, config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings,
        config.rms_norm_eps, rope["rope_theta"], scaling=scaling, init_method_std=config.initializer_range,
        window_size=[window - 1, 0] if any(slides) else None,
        window_attn_skip_freq=None if all(slides) or not any(slides) else [int(s) for s in slides],
        add_qkv_bias=config.model_type in ("qwen2", "qwen2_moe", "gpt_oss") or (
            config.model_type in ("seed_oss", "glm4_moe") and config.attention_bias
        ),
        qk_layernorm=config.model_type in ("qwen3", "qwen3_moe", "olmoe") or getattr(config, "use_qk_norm", False),
        **seen_beside(config, head, scaling),
        **experts_seen_by_transformers(config),
    )  # fmt: skip


def seen_beside(config, head: int, scaling: RopeScaling | None) -> dict:
    """What a family alone has."""
    if config.model_type in LATENT:
        interleaved = getattr(config, "rope_interleave", True)
        position = PositionEmbedding(base=config.rope_parameters["rope_theta"], interleaved=interleaved)
        return {
            "multi_latent_attention": True, "q_lora_rank": config.q_lora_rank, "kv_lora_rank": config.kv_lora_rank,
            "qk_head_dim": config.qk_nope_head_dim, "qk_pos_emb_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim,
            # These norms are built with the default of their class, 1e-6.
            "latent_layernorm_epsilon": None if config.rms_norm_eps == 1e-6 else 1e-6,
            "kv_channels": config.qk_nope_head_dim + config.qk_rope_head_dim,
            "position_embedding": dataclasses.asdict(dataclasses.replace(position, scaling=scaling)),
        }  # fmt: skip
    if config.model_type == "gpt_oss":
        return {
            "add_bias_linear": True, "activation": "quick_gelu", "activation_func_clamp_value": config.swiglu_limit,
            "glu_linear_offset": 1.0, "softmax_type": "learnable",
        }  # fmt: skip
    if config.model_type == "glm4_moe":
        rope = config.rope_parameters
        position = PositionEmbedding(base=rope["rope_theta"], percent=rope["partial_rotary_factor"], scaling=scaling)
        return {"position_embedding": dataclasses.asdict(position)}
    if config.model_type == "smollm3":
        return {"no_rope_freq": None if all(config.no_rope_layers) else [1 - x for x in config.no_rope_layers]}
    if config.model_type == "granite":
        names = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
        found = {name: getattr(config, name) for name in names}
        return found | ({"attention_multiplier": None} if found["attention_multiplier"] == head**-0.5 else {})
    return {}


def experts_seen_by_transformers(config) -> dict:
    if config.model_type not in FAMILIES or not FAMILIES[config.model_type].experts:
        return {}
    layers, dense = range(config.num_hidden_layers), getattr(config, "mlp_only_layers", [])
    sparse = [int(i not in dense and (i + 1) % getattr(config, "decoder_sparse_step", 1) == 0) for i in layers]
    if config.model_type in ("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite"):
        if config.model_type == "glm4_moe_lite":
            sparse = [int(kind == "sparse") for kind in config.mlp_layer_types]
        else:
            sparse = [int(i >= config.first_k_dense_replace) for i in layers]
        return experts_beside_a_shared_one(config, sparse) if any(sparse) else {}
    return {
        "num_moe_experts": config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": getattr(config, "moe_intermediate_size", config.intermediate_size),
        "moe_layer_freq": 1 if all(sparse) else sparse,
        "moe_router_norm_topk_prob": getattr(config, "norm_topk_prob", True),
        "moe_shared_expert_intermediate_size": getattr(config, "shared_expert_intermediate_size", None),
        "moe_shared_expert_gate": config.model_type == "qwen2_moe",
        "qk_layernorm_across_heads": config.model_type == "olmoe",
    }


def experts_beside_a_shared_one(config, sparse: list[int]) -> dict:
    second = config.model_type == "deepseek_v2"
    limited = config.topk_method != "greedy" if second else config.topk_group < config.n_group
    best = 1 if second else 2
    return {
        "num_moe_experts": config.n_routed_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": 1 if all(sparse) else sparse,
        "moe_router_norm_topk_prob": config.norm_topk_prob,
        "moe_router_score_function": "softmax" if second else "sigmoid",
        "moe_router_enable_expert_bias": not second,
        "moe_router_topk_scaling_factor": None if config.routed_scaling_factor == 1 else config.routed_scaling_factor,
        "moe_router_num_groups": config.n_group if limited else None,
        "moe_router_group_topk": config.topk_group if limited else None,
        "moe_router_group_best": best if limited and config.num_experts_per_tok != best * config.topk_group else None,
        "moe_shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size,
    }
