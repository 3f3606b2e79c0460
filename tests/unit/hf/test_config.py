"""config.json in and out: what published files mean, what is refused, and transformers' own reading beside ours."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.hf import hf_model_config, is_hf_folder, make_hf_config, read_hf_config
from megatron_ext.hf.config import difference
from megatron_ext.hf.families import FAMILIES
from megatron_ext.kinds import Kind, names
from megatron_ext.models import GPTModelConfig
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import RopeScaling

# As published, key for key.
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


def expected(layers, hidden, heads, groups, head, ffn, vocab, length, tied, eps, base, **more):
    """Every field that is read, by hand."""
    scaling = more.pop("scaling", None)
    return {
        "num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_query_groups": groups,
        "kv_channels": head, "ffn_hidden_size": ffn, "vocab_size": vocab, "encoder_seq_length": length,
        "share_embeddings_and_output_weights": tied, "layernorm_epsilon": eps, "add_qkv_bias": False,
        "qk_layernorm": False, "init_method_std": 0.02, "window_size": None, "window_attn_skip_freq": None,
        "attn_logit_softcapping": None, "vision": None,
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
    "Qwen3-8B": (QWEN3_8B, expected(36, 4096, 32, 8, 128, 12288, 151936, 40960, False, 1e-6, 1e6, qk_layernorm=True)),
    "Qwen3-0.6B": (QWEN3_06B, expected(28, 1024, 16, 8, 128, 3072, 151936, 40960, True, 1e-6, 1e6, qk_layernorm=True)),
}  # fmt: skip


def write(folder, raw) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))


def seen_by_transformers(folder) -> dict:
    """The same fields out of transformers' own configuration object."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder))
    rope = config.rope_parameters
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = RopeScaling(*(rope[k] for k in keys)) if rope["rope_type"] == "llama3" else None
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
        add_qkv_bias=config.model_type == "qwen2", qk_layernorm=config.model_type == "qwen3",
    )  # fmt: skip


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

    write(tmp_path, {"model_type": family})
    assert read_hf_config(tmp_path) == seen_by_transformers(tmp_path)
    theirs = AutoConfig.for_model(family)
    fields = {f.name: f.default for f in dataclasses.fields(type(theirs))}
    assert {key: fields[key] for key in FAMILIES[family].defaults if key in fields} == {
        key: value for key, value in FAMILIES[family].defaults.items() if key in fields
    }
    # Qwen2's class has no head_dim, and its layers ask for one all the same.
    assert FAMILIES[family].defaults.keys() - fields.keys() <= {"head_dim"}
    assert theirs.default_theta == 10000.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "more",
    [
        {"num_key_value_heads": None},
        {"rope_theta": 7e5, "rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 7e5},
        {"rope_scaling": {**LLAMA_31_8B["rope_scaling"], "original_max_position_embeddings": 32}, "rope_theta": 7e5},
        {"rope_parameters": {k: v for k, v in LLAMA_31_8B["rope_scaling"].items() if "original" not in k}},
        {"rope_theta": 7e5, "original_max_position_embeddings": 16},
        {"use_sliding_window": False, "layer_types": None},
        {"tie_word_embeddings": True, "head_dim": 32},
    ],
)
def test_less_usual_files_mean_the_same_as_to_transformers(tmp_path, family, more):
    raw = {"model_type": family, "num_hidden_layers": 30, "num_attention_heads": 32, "vocab_size": 99}
    write(tmp_path, raw | {"hidden_size": 4096, "intermediate_size": 512, "max_position_embeddings": 64} | more)
    if family == "mistral" and "num_key_value_heads" in more:  # not even read by this release of transformers
        assert read_hf_config(tmp_path)["num_query_groups"] == 32
        return
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


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (TINY_LLAMA, {"model_type": "gemma2"}, "model_type='gemma2' is not read here, only llama, mistral, qwen2, qwen3"),
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
        (TINY_LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
        (TINY_LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not supported"),
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


@st.composite
def models(draw) -> GPTModelConfig:
    """Whatever a family can hold."""
    layers, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    bias, norm = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    window = draw(st.none() | st.integers(0, 40))
    by_layer = window is not None and (bias or norm)
    every = st.integers(1, 4) | st.lists(st.integers(0, 1), min_size=layers, max_size=layers)
    scaling = draw(st.none() | st.builds(RopeScaling, st.floats(1, 64), st.just(1.0), st.just(4.0), st.integers(1, 99)))
    return GPTModelConfig(
        layers, heads * draw(st.integers(1, 9)) + draw(st.integers(0, 1)), heads, draw(st.integers(1, 99)),
        vocab_size=draw(st.integers(1, 999)), num_query_groups=groups, kv_channels=2 * draw(st.integers(1, 32)),
        encoder_seq_length=draw(st.integers(100, 999)), share_embeddings_and_output_weights=draw(st.booleans()),
        add_qkv_bias=bias, qk_layernorm=norm, layernorm_epsilon=draw(st.floats(1e-8, 1e-3)),
        init_method_std=draw(st.floats(0.001, 1)), window_size=None if window is None else [window, 0],
        window_attn_skip_freq=draw(st.none() | every) if by_layer else None,
        position_embedding=PositionEmbedding(base=draw(st.floats(10, 1e7)), scaling=scaling), precision="32",
    )  # fmt: skip


@given(config=models(), special=st.dictionaries(st.sampled_from(["eos_token_id", "pad_token_id"]), st.integers(0, 9)))
def test_a_configuration_of_ours_comes_back(tmp_path_factory, config, special):
    made = make_hf_config(config, special)
    assert {k: made[k] for k in special} == special
    folder = tmp_path_factory.mktemp("made")
    write(folder, made)
    fields = read_hf_config(folder)
    assert difference(config, fields) is None
    assert fields == seen_by_transformers(folder)
    back = hf_model_config(folder, precision="32")
    for f in dataclasses.fields(config):
        if not f.name.startswith("window"):
            assert getattr(back, f.name) == getattr(config, f.name), f.name
    assert back.layer_windows == config.layer_windows
    # The only shape that Llama's own class refuses goes to Mistral's.
    assert made["model_type"] != "llama" or config.hidden_size % config.num_attention_heads == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"add_qkv_bias": True, "qk_layernorm": True}, "qwen3 cannot hold this model: model.add_qkv_bias is True here"),
        (
            {"window_size": [7, 0], "window_attn_skip_freq": 2},
            "mistral cannot hold this model: model.window_attn_skip_",
        ),
        ({"attn_logit_softcapping": 30.0}, "model.attn_logit_softcapping is 30.0 here and None there"),
        ({"position_embedding": PositionEmbedding(percent=0.5)}, "model.position_embedding is"),
        ({"position_embedding": PositionEmbedding(interleaved=True)}, "model.position_embedding is"),
    ],
)
def test_a_model_that_no_family_has_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make_hf_config(GPTModelConfig(4, 64, 4, 128, vocab_size=99, **changes))
