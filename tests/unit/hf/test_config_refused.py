"""config.json in: what our model does not compute, and what is no such file, is refused in a line."""

from __future__ import annotations

import pytest

from megatron_ext.hf import is_hf_folder, read_hf_config
from tests.published_configs import (
    DEEPSEEK,
    DEEPSEEK_V2,
    GLM4_LITE,
    LLAMA_31_8B,
    MISTRAL_7B_01,
    NAMELESS,
    QWEN3_06B,
    QWEN25_05B,
    TINY_LLAMA,
    write,
)  # fmt: skip


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (TINY_LLAMA, {"model_type": "gemma2"}, "model_type='gemma2' is not read here, only llama, mistral, qwen2, qwen3, minis"),
        (TINY_LLAMA, {"model_type": ["llama"]}, r"model_type=\['llama'\] is not read here"),
        (TINY_LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "is no language model of model_type=llama"),
        (TINY_LLAMA, {"quantization_config": {"bits": 4}}, "quantised weights"),
        (TINY_LLAMA, {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        (TINY_LLAMA, {"mlp_bias": True}, "mlp_bias=True is not supported"),
        (TINY_LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        (TINY_LLAMA, {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        (TINY_LLAMA, {"rope_interleaved": True}, "rope_interleaved=True is not known of llama"),
        (TINY_LLAMA, {"sliding_window": 512}, "sliding_window=512 is not known of llama"),
        (TINY_LLAMA, {"residual_multiplier": 0}, "residual_multiplier=0 is not known of llama"),
        (TINY_LLAMA, {"rope_scaling": {"rope_type": "proportional"}}, "rope_type='proportional' is not supported, only default"),
        (TINY_LLAMA, {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type=.'yarn'. is not supported"),
        (TINY_LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "rope_type='yarn' with .* expected factor >= 1"),
        (TINY_LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2, "low_freq_factor": 1}}, "low_freq_factor is not known"),
        (TINY_LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": 1}}, "truncate must be true or false"),
        (TINY_LLAMA, {"rope_scaling": {"type": "linear"}}, "factor must be a number of at least 0, got None"),
        (TINY_LLAMA, {"rope_scaling": {"type": "longrope", "factor": 2, "short_factor": 3}}, "short_factor must be a list of"),
        (TINY_LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, "factor must be a number of at least 0, got None"),
        (TINY_LLAMA, {"rope_scaling": LLAMA_31_8B["rope_scaling"] | {"beta_fast": 32}}, "beta_fast is not known"),
        (TINY_LLAMA, {"rope_scaling": LLAMA_31_8B["rope_scaling"] | {"high_freq_factor": 0.5}}, "low_freq_factor < high"),
        (LLAMA_31_8B, {"original_max_position_embeddings": 16}, "stands beside the rope's own, which is 8192"),
        (TINY_LLAMA, {"rope_scaling": "llama3"}, "must be an object"),
        (TINY_LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention is not known"),
        (TINY_LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (TINY_LLAMA, {"rope_theta": "1e4"}, "rope_theta must be a number"),
        (TINY_LLAMA, {"hidden_size": None}, "hidden_size must be an integer of at least 1, got None"),
        (TINY_LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, got 0"),
        (TINY_LLAMA, {"num_key_value_heads": True}, "num_key_value_heads must be an integer"),
        (TINY_LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        (TINY_LLAMA, {"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, got None"),
        (MISTRAL_7B_01, {"sliding_window": 0}, "sliding_window must be an integer of at least 1"),
        (MISTRAL_7B_01, {"layer_types": ["full_attention"] * 32}, "layer_types=.* is not known of mistral"),
        (QWEN3_06B, {"attention_bias": True}, "attention_bias=True is not supported"),
        (QWEN3_06B, {"layer_types": ["full_attention"]}, "for each of 28 layers"),
        (QWEN3_06B, {"layer_types": ["chunked_attention"] * 28}, "for each of 28 layers"),
        (QWEN3_06B, {"layer_types": ["sliding_attention"] * 28}, "no sliding window is in use"),
        (QWEN25_05B, {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers must be an integer"),
        (QWEN25_05B, {"use_mrope": True}, "use_mrope=True is not known of qwen2"),
        (NAMELESS | {"model_type": "granite"}, {"logits_scaling": 0}, "logits_scaling must be more than 0"),
        (NAMELESS | {"model_type": "smollm3"}, {"no_rope_layers": [1, 0]}, "for each of 22 layers"),
        (NAMELESS | {"model_type": "seed_oss"}, {"attention_out_bias": True}, "attention_out_bias=True"),
        (NAMELESS | {"model_type": "gpt_oss"}, {"attention_bias": False}, "attention_bias=False is not supported, only True"),
        (NAMELESS | {"model_type": "gpt_oss", "attention_bias": True}, {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5 is not supp"),
        (DEEPSEEK, {"first_k_dense_replace": -3}, "first_k_dense_replace must be an integer of at least 0, got -3"),
        (DEEPSEEK, {"n_routed_experts": None, "first_k_dense_replace": 3}, "n_routed_experts must be an integer"),
        (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob=True is not supported, only False"),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported, only 'greedy'"),
        (GLM4_LITE, {"first_k_dense_replace": 2}, "first_k_dense_replace=2 is not supported, only 1"),
        (GLM4_LITE, {"mlp_layer_types": ["dense", "moe"]}, "mlp_layer_types must name dense or sparse for each of 22 layers"),
        (GLM4_LITE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1"),
        (DEEPSEEK, {"first_k_dense_replace": 3, "n_shared_experts": 0}, "n_shared_experts must be an integer of at least 1"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported, only 'sigmoid'"),
        (DEEPSEEK, {"topk_method": "greedy"}, "topk_method='greedy' is not supported, only 'noaux_tc'"),
        (NAMELESS | {"model_type": "glm4_moe"}, {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 must lie in"),
        (DEEPSEEK, {"num_key_value_heads": 4}, "num_key_value_heads=4 is not supported with latent attention, only 32"),
        (DEEPSEEK, {"kv_lora_rank": None}, "sizes of latent attention must be integers"),
        (TINY_LLAMA, {"rope_theta": 0}, "rope_theta must be more than 0, got 0"),
        (QWEN25_05B, {"num_key_value_heads": 3}, "num_attention_heads=14 is not divisible by num_key_value_heads=3"),
        (QWEN25_05B, {"hidden_size": 897}, "hidden_size=897 is not divisible by num_attention_heads=14, and there is no"),
        (QWEN3_06B, {"head_dim": 63}, "the head size 63 .* must be even"),
    ],
)  # fmt: skip
def test_what_our_model_does_not_compute_is_refused(tmp_path, base, changes, words):
    write(tmp_path, base | changes)
    with pytest.raises(ValueError, match=words) as caught:
        read_hf_config(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize("raw", [LLAMA_31_8B, MISTRAL_7B_01, QWEN25_05B, QWEN3_06B])
def test_a_model_that_looks_ahead_is_refused(tmp_path, raw):
    """transformers makes any family see both ways by this key, which is a field of none."""
    write(tmp_path, raw | {"is_causal": True})
    read_hf_config(tmp_path)
    for value in (False, None, 0):
        write(tmp_path, raw | {"is_causal": value})
        with pytest.raises(ValueError, match=f"is_causal={value} is not supported, only True; choose another model"):
            read_hf_config(tmp_path)


def test_a_missing_or_damaged_file(tmp_path):
    assert not is_hf_folder(tmp_path) and not is_hf_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot read .*config.json .No such file or directory.: name the folder"):
        read_hf_config(tmp_path)
    for text in ("{", "[]", '"llama"', '{"a": ' + "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        for read in (read_hf_config, is_hf_folder):
            with pytest.raises(ValueError, match="config.json is damaged"):
                read(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "ll\xff"}')
    with pytest.raises(ValueError, match="config.json is damaged"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_hf_folder(tmp_path)
