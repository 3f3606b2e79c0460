"""The families of transformers that are read: what each assumes for a key that a config.json leaves out, what our model
computes, and what has no bearing on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "EVERYWHERE", "FAMILIES", "FULL", "FURTHER", "MULTIPLIERS", "NEUTRAL", "NUMBERS", "OLD_FULL", "ONLY", "SAME_AS", "SLIDING",
    "Family", "family_of", "spelled",
]  # fmt: skip

# Of a layer's attention.
FULL = "full_attention"
OLD_FULL = "attention"
SLIDING = "sliding_attention"
# Ours by theirs, where a number is only renamed.
NUMBERS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "encoder_seq_length": "max_position_embeddings",
}
SHARED = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": None, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "initializer_range": 0.02, "attention_dropout": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
# What our model computes; another value is refused.
ONLY = {
    "hidden_act": ("silu", "swish"), "attention_dropout": (0,), "attention_bias": (False,), "mlp_bias": (False,),
    "is_causal": (True,), "clip_qkv": (None,), "qkv_bias": (True,), "router_jitter_noise": (0,),
}  # fmt: skip
# transformers takes it from any family's file, though it is a field of none.
EVERYWHERE = {"is_causal"}
# Of no bearing on the logits: what identifies the file, what a run of it returns, how it generates, what it is tuned for.
NEUTRAL = {
    "architectures", "dtype", "is_llama_config", "model_type", "pretraining_tp", "torch_dtype", "transformers.js_config",
    "transformers_version", "attn_implementation", "chunk_size_feed_forward", "is_decoder", "output_attentions",
    "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "use_cache",
    "begin_suppress_tokens", "bad_words_ids", "bos_token_id", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length", "min_p",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "pad_token_id",
    "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "temperature", "tokenizer_class", "top_k", "top_p", "typical_p", "unk_token_id",
    "finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
    "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip


# Ours by theirs, of experts: where they are only renamed. How many, how many a token takes, their width.
QWEN_EXPERTS = {
    "num_moe_experts": "num_experts", "moe_router_topk": "num_experts_per_tok", "moe_ffn_hidden_size": "moe_intermediate_size",
}  # fmt: skip
DEEPSEEK_EXPERTS = QWEN_EXPERTS | {"num_moe_experts": "n_routed_experts"}
# Tensors of layers that predict further tokens, which a folder has behind the others; how many, by each of the keys' names.
FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")


@dataclass(frozen=True)
class Family:
    """A model_type of transformers: its class, and what it assumes for a missing key.

    Attributes:
        always: what of ours it always has.
        switches, numbers, integers: ours by theirs, where a switch or a number is only renamed; an integer may be null.
        only: as `ONLY`, of this family; it comes first, and may name keys that transformers does not know.
        idle: keys without bearing on the logits.
        theta: what it assumes for a missing rope_theta.
        experts: ours by theirs, of what is only renamed of experts; empty: a family without.
        routing: what of ours it always has where it has experts.
        rotated: the share of a head that rotates where a file does not say it; None: all of it, whatever a file says.
        packed: whether its folders hold all experts of a layer in one tensor, [experts, inputs, outputs], gate and up in turn.
        slides: which layers slide where a file does not say it: all but every n-th.
        rope: what it assumes where a file says nothing of rotation.
        spelling: parts of tensors' names in layers with experts as the family has them, by those of Qwen2-MoE.
        synonyms: keys by other names for them.
        latent_epsilon: what the norms of compressed rows add, whatever a file says.
        group_best: how many of its best experts make a group's worth in transformers.
        interleaved: whether neighbouring channels are a pair, of a family whose files do not say it.
    """

    architecture: str
    defaults: dict[str, Any]
    always: dict[str, Any] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    integers: dict[str, str] = field(default_factory=dict)
    only: dict[str, tuple] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    theta: float = 10000.0
    experts: dict[str, str] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    rotated: float | None = None
    packed: bool = False
    slides: int | None = None
    rope: dict[str, Any] = field(default_factory=dict)
    spelling: dict[str, str] = field(default_factory=dict)
    synonyms: dict[str, str] = field(default_factory=dict)
    latent_epsilon: float | None = None
    group_best: int = 2
    interleaved: bool = False


LLAMA = {
    "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048, "num_key_value_heads": None,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
MISTRAL = {
    "vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8,
    "sliding_window": 4096,
}  # fmt: skip
QWEN = {
    "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_key_value_heads": 32,
}  # fmt: skip
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
# Of experts: every how many layers has them, and which have not all the same; whether chosen scores are divided by their sum.
SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False}
QWEN2_MOE = QWEN | SPARSE | {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True,
}  # fmt: skip
QWEN3_MOE = QWEN | SPARSE | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "attention_bias": False, "use_sliding_window": False, "sliding_window": 4096, "moe_intermediate_size": 768,
    "num_experts_per_tok": 8, "num_experts": 128,
}  # fmt: skip
MIXTRAL = MISTRAL | {
    "rms_norm_eps": 1e-5, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8, "router_jitter_noise": 0.0,
}  # fmt: skip
OLMOE = {
    "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": None, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "attention_bias": False,
    "clip_qkv": None, "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False,
}  # fmt: skip
# Of DeepSeek-V3 and who follows it. Their first layers have no experts.
ROUTED = {
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "n_group": 8,
    "topk_group": 4, "norm_topk_prob": True, "first_k_dense_replace": 3, "moe_intermediate_size": 2048, "attention_bias": False,
}  # fmt: skip
# What transformers does not read of a file, and computes.
ROUTED_ONLY = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)}
ROUTED_IDLE = frozenset({*FURTHER, "auto_map", "ep_size", "aux_loss_alpha", "seq_aux"})
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_gate": False,
}
SOFTMAX = SIGMOID | {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False}
LATENT = {key: value for key, value in SHARED.items() if key != "head_dim"} | {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "attention_bias": False,
}  # fmt: skip
# What `Family` says of all with latent attention, and of all with DeepSeek's routing.
OF_LATENT = {
    "always": {"multi_latent_attention": True},
    "integers": {
        "kv_lora_rank": "kv_lora_rank", "q_lora_rank": "q_lora_rank", "qk_head_dim": "qk_nope_head_dim",
        "qk_pos_emb_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim",
    },
    "latent_epsilon": 1e-6,
}  # fmt: skip
OF_ROUTED = {"experts": DEEPSEEK_EXPERTS, "routing": SIGMOID, "spelling": {"shared_expert.": "shared_experts."}}
LATENT_IDLE = {"head_dim", "qk_head_dim"}
DEEPSEEK = LATENT | ROUTED | {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "max_position_embeddings": 4096, "rope_interleave": True,
}  # fmt: skip
DEEPSEEK_V2 = LATENT | ROUTED | {
    "vocab_size": 102400, "intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048,
    "mlp_bias": False, "first_k_dense_replace": 0, "n_group": None, "topk_group": None, "n_routed_experts": 64,
    "n_shared_experts": 2, "routed_scaling_factor": 1.0, "topk_method": "greedy", "norm_topk_prob": False,
    "num_experts_per_tok": None, "moe_intermediate_size": 1407,
}  # fmt: skip
GLM4_MOE_LITE = LATENT | {key: value for key, value in ROUTED.items() if key != "first_k_dense_replace"} | {
    "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
    "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20, "n_routed_experts": 64,
    "routed_scaling_factor": 1.8, "q_lora_rank": 768, "v_head_dim": 256, "qk_nope_head_dim": 192, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 4, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5,
    "rope_interleave": True, "mlp_layer_types": None,
}  # fmt: skip
YOUTU = LATENT | {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16,
    "num_key_value_heads": 16, "max_position_embeddings": 131072, "initializer_range": None, "tie_word_embeddings": True,
    "rope_interleave": True,
}  # fmt: skip
GLM4_MOE = ROUTED | {
    "vocab_size": 151552, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "moe_intermediate_size": 1408,
    "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "use_qk_norm": False,
}  # fmt: skip
FAMILIES = {
    "llama": Family("LlamaForCausalLM", SHARED | LLAMA),
    "mistral": Family("MistralForCausalLM", SHARED | MISTRAL),
    "qwen2": Family("Qwen2ForCausalLM", SHARED | WINDOWED | QWEN, {"add_qkv_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        SHARED | WINDOWED | QWEN | {"head_dim": 128, "attention_bias": False},
        {"qk_layernorm": True},
    ),
    "ministral": Family("MinistralForCausalLM", SHARED | MISTRAL | {"layer_types": None}),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        SHARED
        | LLAMA
        | {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
            "use_sliding_window": False, "sliding_window": None, "layer_types": None, "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },  # fmt: skip
        theta=2e6,
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        SHARED
        | {
            "vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 80,
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288, "attention_bias": True,
            "attention_out_bias": False, "mlp_bias": False, "attention_dropout": 0.1, "residual_dropout": 0.1,
        },  # fmt: skip
        switches={"add_qkv_bias": "attention_bias"},
        only={"attention_bias": (True, False), "attention_out_bias": (False,)},
        # Of its own training; what is trained here is trained without, as everything is.
        idle=frozenset({"attention_dropout", "residual_dropout"}),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        SHARED | LLAMA | dict.fromkeys(MULTIPLIERS, 1.0),
        numbers={name: name for name in MULTIPLIERS},
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        DEEPSEEK,
        only=ROUTED_ONLY,
        idle=ROUTED_IDLE | LATENT_IDLE,
        **OF_ROUTED,
        synonyms={"num_local_experts": "n_routed_experts"},
        **OF_LATENT,
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        GLM4_MOE_LITE,
        only=ROUTED_ONLY | {"first_k_dense_replace": (1,)},
        idle=ROUTED_IDLE | {"qk_head_dim"},
        **OF_ROUTED,
        synonyms={"num_local_experts": "n_routed_experts", "head_dim": "qk_rope_head_dim"},
        **OF_LATENT,
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        DEEPSEEK_V2,
        only={
            "scoring_func": ("softmax",), "moe_layer_freq": (1,), "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),
        },  # fmt: skip
        idle=ROUTED_IDLE | LATENT_IDLE,
        **OF_ROUTED | {"routing": SOFTMAX},
        synonyms={"num_experts": "n_routed_experts"},
        **OF_LATENT,
        group_best=1,
        interleaved=True,
    ),
    "youtu": Family(
        "YoutuForCausalLM",
        YOUTU,
        idle=frozenset({*LATENT_IDLE, "auto_map", "embedding_initializer_range"}),
        **OF_LATENT,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        SHARED | GLM4_MOE,
        switches={"add_qkv_bias": "attention_bias", "qk_layernorm": "use_qk_norm"},
        only={"attention_bias": (False, True)} | ROUTED_ONLY,
        idle=ROUTED_IDLE,
        rotated=0.5,
        **OF_ROUTED,
        synonyms={"num_local_experts": "n_routed_experts"},
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        SHARED
        | {
            "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "sliding_window": 128, "layer_types": None, "num_local_experts": 128,
            "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True,
        },  # fmt: skip
        always={
            "add_qkv_bias": True, "add_bias_linear": True, "softmax_type": "learnable", "activation": "quick_gelu",
            "glu_linear_offset": 1.0,
        },  # fmt: skip
        numbers={"activation_func_clamp_value": "swiglu_limit"},
        only={"attention_bias": (True,), "swiglu_alpha": (1.702,)},
        idle=frozenset({"experts_per_token", "initial_context_length"}),
        theta=150000.0,
        experts=QWEN_EXPERTS | {"num_moe_experts": "num_local_experts", "moe_ffn_hidden_size": "intermediate_size"},
        packed=True,
        slides=2,
        rope={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },  # fmt: skip
        spelling={"mlp.gate.": "mlp.router."},
        synonyms={"num_experts": "num_local_experts"},
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        SHARED | OLMOE,
        {"qk_layernorm": True, "qk_layernorm_across_heads": True},
        experts=QWEN_EXPERTS | {"moe_ffn_hidden_size": "intermediate_size"},
        synonyms={"num_local_experts": "num_experts"},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        SHARED | QWEN3_MOE,
        {"qk_layernorm": True},
        experts=QWEN_EXPERTS,
        synonyms={"num_local_experts": "num_experts"},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        SHARED | WINDOWED | QWEN2_MOE,
        {"add_qkv_bias": True},
        experts=QWEN_EXPERTS | {"moe_shared_expert_intermediate_size": "shared_expert_intermediate_size"},
        routing={"moe_shared_expert_gate": True},
        only={"use_sliding_window": (False,)},  # its own rule says which layers slide
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        SHARED | MIXTRAL,
        experts=QWEN_EXPERTS | {"num_moe_experts": "num_local_experts", "moe_ffn_hidden_size": "intermediate_size"},
        spelling={
            "mlp.": "block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
        },
        synonyms={"num_experts": "num_local_experts"},
        theta=1e6,
    ),
}  # fmt: skip


# What calls itself otherwise and is the same.
SAME_AS = {"kimi_k2": "deepseek_v3"}


def family_of(config) -> str:
    """The family that such a model is written as, of those that hold it by their names for tensors; whether the family can hold
    all of it, `make_hf_config` says.

    Args:
        config: what has the architectural keys of `GPTModelConfig`.
    """
    if config.num_moe_experts is not None:
        fits = lambda own: all(getattr(config, key) == value for key, value in own.items())  # noqa: E731
        return next(
            name for name, family in FAMILIES.items() if family.experts and fits(family.always | family.routing)
        )
    if config.multi_latent_attention:
        return "deepseek_v3"
    if config.layers_without_rope:
        return "smollm3"
    plain = {"attention_multiplier": config.kv_channels**-0.5}
    if any(getattr(config, name) not in (None, plain.get(name, 1.0)) for name in MULTIPLIERS):
        return "granite"
    if config.qk_layernorm:
        return "qwen3"
    if config.add_qkv_bias:
        return "qwen2"
    # LlamaConfig wants hidden_size to divide by the heads even where head_dim is given.
    return "llama" if config.window_size is None and config.hidden_size % config.num_attention_heads == 0 else "mistral"


def spelled(name: str, spelling: dict[str, str]) -> str:
    """A tensor's name in its family."""
    for ours, theirs in spelling.items():
        name = name.replace(ours, theirs)
    return name
