"""Our GPT's weights as transformers' Llama: written by hand, so that its answers are another implementation's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.models.config import GPTModelConfig

__all__ = ["save_llama"]


def save_llama(folder: Path, weights: dict[str, Tensor], config: GPTModelConfig) -> None:
    """Write a Hugging Face folder without a tokenizer. For models without QKV bias and q and k norms."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_query_groups,
            head_dim=config.kv_channels,
            rms_norm_eps=config.layernorm_epsilon,
            max_position_embeddings=config.encoder_seq_length,
            tie_word_embeddings=config.share_embeddings_and_output_weights,
        )
    )
    queries = config.num_attention_heads // config.num_query_groups * config.kv_channels
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][: config.vocab_size],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        heads = weights[f"{ours}self_attention.linear_qkv.weight"].view(config.num_query_groups, -1, config.hidden_size)
        q, k, v = heads.split([queries, config.kv_channels, config.kv_channels], dim=1)
        gate, up = weights[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        state |= {
            f"{theirs}self_attn.q_proj.weight": q.flatten(0, 1),
            f"{theirs}self_attn.k_proj.weight": k.flatten(0, 1),
            f"{theirs}self_attn.v_proj.weight": v.flatten(0, 1),
            f"{theirs}self_attn.o_proj.weight": weights[f"{ours}self_attention.linear_proj.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": weights[f"{ours}mlp.linear_fc2.weight"],
            f"{theirs}input_layernorm.weight": weights[f"{ours}input_layernorm.weight"],
            f"{theirs}post_attention_layernorm.weight": weights[f"{ours}pre_mlp_layernorm.weight"],
        }
    missing, unexpected = llama.load_state_dict({k: v.detach().clone() for k, v in state.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    llama.tie_weights()
    llama.save_pretrained(str(folder))
    assert all(torch.isfinite(p).all() for p in llama.parameters())
