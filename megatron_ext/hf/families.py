"""The families of transformers that are read: what each assumes for a key that a config.json leaves out, what our model
computes, and what has no bearing on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["EVERYWHERE", "FAMILIES", "FULL", "NEUTRAL", "NUMBERS", "OLD_FULL", "ONLY", "SLIDING", "Family"]

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
    "is_causal": (True,),
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
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model_type of transformers: its class, what it assumes for a missing key, and what of ours it always has."""

    architecture: str
    defaults: dict[str, Any]
    always: dict[str, bool] = field(default_factory=dict)


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
FAMILIES = {
    "llama": Family("LlamaForCausalLM", SHARED | LLAMA),
    "mistral": Family("MistralForCausalLM", SHARED | MISTRAL),
    "qwen2": Family("Qwen2ForCausalLM", SHARED | WINDOWED | QWEN, {"add_qkv_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        SHARED | WINDOWED | QWEN | {"head_dim": 128, "attention_bias": False},
        {"qk_layernorm": True},
    ),
}
