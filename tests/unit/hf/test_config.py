"""config.json in: what published files mean, and transformers' own reading beside ours."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ext.hf import hf_model_config, read_hf_config
from megatron_ext.hf.config import difference
from megatron_ext.hf.families import FAMILIES
from megatron_ext.kinds import Kind, names
from megatron_ext.models import GPTModelConfig
from tests.configs_seen import seen_by_transformers
from tests.published_configs import LLAMA_31_8B, PUBLISHED, write

# Of whose files there are many kinds.
COMMON = [name for name, family in FAMILIES.items() if not family.experts or "n_group" in family.defaults]
# Whose hidden_size is no multiple of its heads if a file says neither; whose experts of a token a file must say.
NEEDED = {"glm4_moe": {"head_dim": 128}, "deepseek_v2": {"num_experts_per_tok": 2}}
# Of a latent row every head makes its own keys and values.
ALL_HEADS = dict.fromkeys(("deepseek_v3", "glm4_moe_lite", "youtu"), {"num_key_value_heads": 32})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_field_by_field(tmp_path, name):
    raw, fields = PUBLISHED[name]
    write(tmp_path, raw)
    assert read_hf_config(tmp_path) == fields == seen_by_transformers(tmp_path)
    config = hf_model_config(tmp_path, precision="32")
    assert {k: v for k, v in dataclasses.asdict(config).items() if k in fields} == fields
    assert difference(config, fields) is None
    assert set(fields) == set(names(GPTModelConfig, Kind.ARCHITECTURE, Kind.LIMIT, Kind.START))


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_mean_what_transformers_assumes(tmp_path, family):
    """A file with nothing but its family."""
    from transformers import AutoConfig

    write(tmp_path, {"model_type": family} | NEEDED.get(family, {}))
    assert read_hf_config(tmp_path) == seen_by_transformers(tmp_path)
    theirs = AutoConfig.for_model(family)
    fields = {f.name: f.default for f in dataclasses.fields(type(theirs))}
    assert {key: fields[key] for key in FAMILIES[family].defaults if key in fields} == {
        key: value for key, value in FAMILIES[family].defaults.items() if key in fields
    }
    # Qwen2's class has no head_dim, and its layers ask for one all the same.
    assert FAMILIES[family].defaults.keys() - fields.keys() <= {"head_dim"}
    assert theirs.default_theta == FAMILIES[family].theta


@pytest.mark.parametrize("family", COMMON)
@pytest.mark.parametrize(
    "more",
    [
        {"num_key_value_heads": None},
        {"rope_theta": 7e5, "rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 7e5},
        {"rope_scaling": {**LLAMA_31_8B["rope_scaling"], "original_max_position_embeddings": 32}, "rope_theta": 7e5},
        {"rope_parameters": {k: v for k, v in LLAMA_31_8B["rope_scaling"].items() if "original" not in k}},
        {"rope_theta": 7e5, "original_max_position_embeddings": 16},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 20,
                "mscale": 0.7,
                "mscale_all_dim": 1.0,
            }
        },
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 2], "long_factor": [3.0, 4]}, "rope_theta": 7e5},
        {"use_sliding_window": False, "layer_types": None},
        {"tie_word_embeddings": True, "head_dim": 32},
    ],
)
def test_less_usual_files_mean_the_same_as_to_transformers(tmp_path, family, more):
    raw = {"model_type": family, "num_hidden_layers": 30, "num_attention_heads": 32, "vocab_size": 99}
    write(
        tmp_path,
        raw
        | ALL_HEADS.get(family, {})
        | NEEDED.get(family, {})
        | {"hidden_size": 4096, "intermediate_size": 512, "max_position_embeddings": 64}
        | more,
    )
    if (
        family in ("mistral", "ministral", "glm4_moe", "glm4_moe_lite", "youtu") and "num_key_value_heads" in more
    ):  # not even read by this release of transformers
        assert read_hf_config(tmp_path)["num_query_groups"] == 32
        return
    if family == "ministral" and "longrope" in str(more):  # nor this, without head_dim
        assert read_hf_config(tmp_path)["position_embedding"]["scaling"]["short_factor"] == [1.0, 2.0]
        return
    assert read_hf_config(tmp_path) == seen_by_transformers(tmp_path)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 0, 1, 0]}),
        ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 7}),
        ("smollm3", {"no_rope_layer_interval": 9}),
        ("ministral", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("ministral", {"sliding_window": None}),
        ("seed_oss", {"attention_bias": False, "residual_dropout": 0.0}),
        ("granite", {"attention_multiplier": 0.75, "residual_multiplier": 2}),
        ("granite", {"attention_multiplier": 0.25}),
        (
            "deepseek_v3",
            {"first_k_dense_replace": 4, "q_lora_rank": None, "qk_rope_head_dim": 32, "rope_interleave": False},
        ),
        (
            "deepseek_v3",
            {
                "first_k_dense_replace": 9,
                "n_shared_experts": 3,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 40,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 4096,
                    "beta_fast": 32,
                    "beta_slow": 1,
                },
            },
        ),
        (
            "gpt_oss",
            {"layer_types": ["full_attention", "sliding_attention"] * 2, "swiglu_limit": 5.0, "experts_per_token": 4},
        ),
        ("gpt_oss", {"sliding_window": 9, "rope_theta": 1e4}),
        ("deepseek_v3", {"first_k_dense_replace": 0, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
        (
            "deepseek_v3",
            {"first_k_dense_replace": 0, "n_group": 4, "topk_group": 3, "num_experts_per_tok": 4, "rms_norm_eps": 1e-5},
        ),
        (
            "deepseek_v2",
            {
                "num_experts_per_tok": 4,
                "n_group": 4,
                "topk_group": 2,
                "q_lora_rank": None,
                "routed_scaling_factor": 16.0,
            },
        ),
        (
            "deepseek_v2",
            {
                "topk_method": "group_limited_greedy",
                "num_experts_per_tok": 6,
                "n_group": 8,
                "topk_group": 3,
                "rms_norm_eps": 1e-5,
            },
        ),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "num_experts_per_tok": 3, "n_group": 8, "topk_group": 3},
        ),
        (
            "glm4_moe_lite",
            {"mlp_layer_types": ["sparse", "dense"] * 2, "n_shared_experts": 2, "partial_rotary_factor": 1.0},
        ),
        ("youtu", {"q_lora_rank": None, "initializer_range": 0.03, "embedding_initializer_range": 0.1}),
        ("glm4_moe", {"first_k_dense_replace": 2, "use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2}),
        (
            "glm4_moe",
            {"partial_rotary_factor": 0.25, "norm_topk_prob": False, "routed_scaling_factor": 2.0, "head_dim": 32},
        ),
        ("glm4_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5, "partial_rotary_factor": 1.0}}),
    ],
)
def test_what_one_family_has_is_that_of_transformers(tmp_path, family, more):
    raw = {"model_type": family, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99, "hidden_size": 64}
    if "no_rope_layers" in more:
        more = more | {"no_rope_layers": more["no_rope_layers"][:4]}
    write(tmp_path, raw | {"intermediate_size": 512, "max_position_embeddings": 64, "num_key_value_heads": 4} | more)
    assert read_hf_config(tmp_path) == seen_by_transformers(tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "more",
    [
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 1},
        {
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ],
)
def test_windows_are_those_of_transformers(tmp_path, family, more):
    raw = {"model_type": family, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99, "hidden_size": 64}
    write(tmp_path, raw | {"intermediate_size": 512, "max_position_embeddings": 64, "num_key_value_heads": 4} | more)
    assert read_hf_config(tmp_path) == seen_by_transformers(tmp_path)
