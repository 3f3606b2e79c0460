"""Families with experts: tensors of all experts of a layer, published configurations, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.hf import export_hf, hf_model_config, make_hf_config, read_hf_config
from megatron_ext.hf.config import difference
from megatron_ext.hf.mapping import hf_shapes
from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.planner.parameters import active_parameters, model_parameters
from recipes.planning import read_config
from tests.hf_folders import imported, set_config, tensors
from tests.hf_models import EXPERT_CASES, clear_text, make_hf_model
from tests.published_configs import QWEN25_7B, QWEN25_7B_YARN, write

# huggingface.co/Qwen/Qwen3-30B-A3B and Qwen3-235B-A22B, mistralai/Mixtral-8x7B-v0.1, allenai/OLMoE-1B-7B-0924,
# Qwen/Qwen1.5-MoE-A2.7B, deepseek-ai/DeepSeek-V3, zai-org/GLM-4.5-Air: config.json, without what identifies the file. Billions
# of parameters as their cards have them.
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
# huggingface.co/deepseek-ai/DeepSeek-V2-Lite (15.7 and 2.4, arXiv 2405.04434), moonshotai/Kimi-K2-Instruct (1026.4 and 32,
# arXiv 2507.20534), zai-org/GLM-4.7-Flash ("30B-A3B"). What a token goes through is counted here with both embeddings.
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 102400,
}  # fmt: skip
KIMI_K2 = DEEPSEEK_V3 | {
    "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1, "max_position_embeddings": 131072,
    "model_type": "kimi_k2", "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
GLM_4_7_FLASH = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10240, "kv_lora_rank": 512,
    "max_position_embeddings": 202752, "model_type": "glm4_moe_lite", "moe_intermediate_size": 1536, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 20, "num_experts_per_tok": 4,
    "num_hidden_layers": 47, "num_key_value_heads": 20, "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0,
    "q_lora_rank": 768, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 1000000, "routed_scaling_factor": 1.8, "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "v_head_dim": 256, "vocab_size": 154880,
}  # fmt: skip
KIN = {
    "kimi_k2": "deepseek_v3",
    "glm4_moe_lite": "deepseek_v3",
}  # as what they are written where they came from no file
# huggingface.co/openai/gpt-oss-20b and 120b.
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
PUBLISHED = {
    "gpt_oss_20b": (GPT_OSS_20B, 20.9, 4.19),
    "gpt_oss_120b": (
        GPT_OSS_20B | {
            "layer_types": ["sliding_attention", "full_attention"] * 18, "num_hidden_layers": 36, "num_local_experts": 128,
        }, 116.8, 5.71,
    ),
    "qwen3_30b_a3b": (QWEN3_30B, 30.5, 3.3),
    "qwen3_235b_a22b": (
        QWEN3_30B | {
            "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94, "moe_intermediate_size": 1536,
            "num_attention_heads": 64, "num_hidden_layers": 94,
        }, 235.1, 22.2,
    ),
    "mixtral_8x7b": (
        {
            "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
            "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
            "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
            "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
            "vocab_size": 32000,
        }, 46.7, 12.9,
    ),
    "olmoe_1b_7b": (
        {
            "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
            "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
            "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
            "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
            "use_cache": True, "vocab_size": 50304,
        }, 6.9, 1.3,
    ),
    "qwen1_5_moe_a2_7b": (
        {
            "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
            "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
            "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
            "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
            "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
        }, 14.3, 2.7,
    ),
    "deepseek_v3": (DEEPSEEK_V3, 671.0, 37.55),
    "deepseek_v2_lite": (DEEPSEEK_V2_LITE, 15.7, 2.66),
    "kimi_k2": (KIMI_K2, 1026.4, 32.86),
    "glm_4_7_flash": (GLM_4_7_FLASH, 29.9, 3.90),
    "glm4_5_air": (
        {
            "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
            "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 131072,
            "model_type": "glm4_moe", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128,
            "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8,
            "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "pad_token_id": 151329,
            "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
            "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16",
            "use_cache": True, "use_qk_norm": False, "vocab_size": 151552,
        }, 106.9, 13.42,  # published: 106 and 12, with the layer behind the last, without embedding and output
    ),
}  # fmt: skip
# Billions that a token goes through as published, where the embedding, of which it takes a row, is left out: the card of gpt-oss
# (arXiv 2508.10925, table 1); github.com/deepseek-ai/DeepSeek-V3, README.md (37; README_WEIGHTS.md has 36.7 and says that both
# embeddings are in it, with which we count 37.55).
WITHOUT_EMBEDDING = {"gpt_oss_20b": 3.61, "gpt_oss_120b": 5.13, "deepseek_v3": 36.6}
# Numbers in the tensors of a published folder, exactly.
STORED = {"kimi_k2": 1_026_408_232_448}
# Published files, and the nodes of 8 GPUs that the YAML of these models are for.
NODES = {
    "qwen3_30b_a3b": 2, "qwen3_235b_a22b": 8, "gpt_oss_20b": 2, "gpt_oss_120b": 8, "glm4_5_air": 8, "deepseek_v3": 32,
}  # fmt: skip
YAML = {name: (PUBLISHED[name][0], nodes) for name, nodes in NODES.items()} | {
    "qwen2_5_7b": (QWEN25_7B, 1), "qwen2_5_7b_128k": (QWEN25_7B_YARN, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def originals(module_rng, tmp_path_factory):
    """A folder of each family, as transformers saves it."""
    root = tmp_path_factory.mktemp("experts")
    for name in EXPERT_CASES:
        make_hf_model(root / name, name, module_rng)
    return root


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_tensors_of_all_experts_of_a_layer_are_read_apart(name, originals, rng, tmp_path, world):
    """As transformers 5 holds them, and saves them if asked; what is written is what is published."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(originals / name), dtype=torch.float32)
    model.save_pretrained(str(tmp_path / "packed"), save_original_format=False)
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in tensors(tmp_path / "packed"))
    ours = imported(tmp_path / "packed", world)
    export_hf(ours, tmp_path / "out", source=tmp_path / "packed")
    published, written = tensors(originals / name), tensors(tmp_path / "out")
    assert published.keys() == written.keys() and not any("gate_up" in key for key in published)
    assert all(torch.equal(tensor, written[key]) for key, tensor in published.items())
    text, expected = clear_text(tmp_path / "out", rng, 17)
    assert (text_logits(ours, text) - expected).abs().max() <= 1e-4


def test_kimi_k2_is_deepseek_v3_by_another_name(rng, tmp_path, world):
    """Transformers has no such type, so it reads the other's. Its yarn has fast pairs end where slow ones begin."""
    rope = KIMI_K2["rope_scaling"] | {"original_max_position_embeddings": 16, "factor": 4.0}
    make_hf_model(tmp_path / "v3", "deepseek_v3, one group", rng, rope_scaling=rope)
    shutil.copytree(tmp_path / "v3", tmp_path / "kimi")
    auto_map = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    set_config(tmp_path / "kimi", model_type="kimi_k2", auto_map=auto_map)
    ours = imported(tmp_path / "kimi", world)
    assert (
        ours.model_config.position_embedding.scaling.beta_fast == ours.model_config.position_embedding.scaling.beta_slow
    )
    text, expected = clear_text(tmp_path / "v3", rng, 37)
    assert (text_logits(ours, text) - expected).abs().max() <= 1e-4
    export_hf(ours, tmp_path / "out", source=tmp_path / "kimi")
    before, after = tensors(tmp_path / "kimi"), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "kimi_k2"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_numbers_of_parameters(name, tmp_path):
    """In total, and of those that a token goes through; and their config.json is written as it was read."""
    raw, total, active = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = hf_model_config(tmp_path, precision="bf16")
    assert f"{model_parameters(config) / 1e9:.1f}" == f"{total}"
    assert abs(active_parameters(config) / 1e9 - active) < 0.06  # the card cuts digits off
    if name in WITHOUT_EMBEDDING:
        without = active_parameters(config) - config.vocab_size * config.hidden_size
        assert abs(without / 1e9 - WITHOUT_EMBEDDING[name]) < 0.05
    if total < 40 or name in STORED:
        stored = {key: torch.Size(shape).numel() for key, shape in hf_shapes(config).items()}
        biases = sum(
            count for key, count in stored.items() if key.endswith("e_score_correction_bias")
        )  # which do not train
        assert sum(stored.values()) - biases == model_parameters(config)
        assert sum(stored.values()) == STORED.get(name, sum(stored.values()))
    made = make_hf_config(config)
    (tmp_path / "config.json").write_text(json.dumps(made))
    assert made["model_type"] == KIN.get(raw["model_type"], raw["model_type"])
    assert hf_model_config(tmp_path, precision="bf16") == config


@pytest.mark.parametrize("name", YAML)
def test_a_yaml_says_what_the_published_file_says(name, tmp_path):
    """Field by field, but the longest sequence, which a recipe chooses."""
    raw, nodes = YAML[name]
    write(tmp_path, raw)
    fields, theirs = read_hf_config(tmp_path), hf_model_config(tmp_path, precision="bf16")
    model = read_config("grpo", [f"model={name}", f"cluster={nodes}x8"]).model
    assert difference(model, fields) is None
    # Of these there are several ways to say the same.
    said = {"encoder_seq_length", "window_attn_skip_freq", "moe_layer_freq", "moe_ffn_hidden_size"}
    ours = dataclasses.asdict(model)
    for key, value in fields.items():
        assert key in said or ours[key] == value, key
    for key in ("layer_windows", "layers_with_experts", "expert_width"):
        assert getattr(model, key) == getattr(theirs, key)
    assert "layernorm_epsilon is 0.0001 here" in difference(dataclasses.replace(model, layernorm_epsilon=1e-4), fields)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported, only None"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported, only 0"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True is not supported, only False"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias=False is not supported, only True"),
        ("qwen3_moe", {"decoder_sparse_step": 9}, "leave no layer with experts"),
        ("qwen3_moe", {"mlp_only_layers": "none"}, "mlp_only_layers must be a list of layers"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts must be an integer of at least 1"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ("qwen3_moe", {"n_group": 4}, "n_group=4 is not known of qwen3_moe"),
    ],
)
def test_what_a_family_has_and_we_do_not_compute_is_refused(name, changes, words, originals, tmp_path):
    raw = json.loads((originals / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    set_config(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        read_hf_config(tmp_path)
