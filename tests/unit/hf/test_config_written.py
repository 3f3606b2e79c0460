"""config.json out: what a configuration of ours becomes, and that it comes back."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.hf import hf_model_config, make_hf_config, read_hf_config
from megatron_ext.hf.config import difference
from megatron_ext.models import GPTModelConfig
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import RopeScaling
from tests.configs_seen import seen_by_transformers
from tests.published_configs import write


@st.composite
def models(draw) -> GPTModelConfig:
    """Whatever a family can hold."""
    layers, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    head = 2 * draw(st.integers(1, 32))
    kind = draw(st.sampled_from(["plain", "bias", "norm", "still layers", "multipliers"]))
    bias, norm, more = kind == "bias", kind == "norm", {}
    if kind == "still layers":
        more = {"no_rope_freq": draw(st.integers(1, layers))}
    if kind == "multipliers":
        some = st.just(1.0) | st.floats(0.1, 9)
        more = {"embedding_multiplier": draw(some), "residual_multiplier": draw(some)}
        more["attention_multiplier"] = draw(st.none() | st.just(head**-0.5) | some)
    window = None if kind == "multipliers" else draw(st.none() | st.integers(0, 40))
    by_layer = window is not None and kind != "plain"
    every = st.integers(1, 4) | st.lists(st.integers(0, 1), min_size=layers, max_size=layers)
    factors = st.lists(st.floats(1, 9), min_size=head // 2, max_size=head // 2)
    f, some = st.floats(1, 64), st.none() | st.floats(0.1, 2)
    scaling = draw(
        st.none()
        | st.one_of(
            st.builds(RopeScaling, f, st.just(1.0), st.just(4.0), st.integers(1, 99)),
            st.builds(RopeScaling, f.filter(lambda x: x != 1), rope_type=st.just("linear")),
            st.builds(RopeScaling, f, original_max_position_embeddings=st.just(999), rope_type=st.just("dynamic")),
            st.builds(
                RopeScaling,
                f,
                original_max_position_embeddings=st.integers(1, 99),
                rope_type=st.just("yarn"),
                beta_fast=st.floats(9, 40),
                attention_factor=some,
                mscale=some,
                mscale_all_dim=some,
                truncate=st.booleans(),
            ),
            st.builds(
                RopeScaling,
                f,
                original_max_position_embeddings=st.just(999),
                rope_type=st.just("longrope"),
                attention_factor=some,
                short_factor=factors,
                long_factor=factors,
            ),
        )
    )
    return GPTModelConfig(
        layers, heads * draw(st.integers(1, 9)) + draw(st.integers(0, 1)), heads, draw(st.integers(1, 99)),
        vocab_size=draw(st.integers(1, 999)), num_query_groups=groups, kv_channels=head,
        encoder_seq_length=draw(st.integers(100, 999)), share_embeddings_and_output_weights=draw(st.booleans()),
        add_qkv_bias=bias, qk_layernorm=norm, layernorm_epsilon=draw(st.floats(1e-8, 1e-3)),
        init_method_std=draw(st.floats(0.001, 1)), window_size=None if window is None else [window, 0],
        window_attn_skip_freq=draw(st.none() | every) if by_layer else None,
        position_embedding=PositionEmbedding(base=draw(st.floats(10, 1e7)), scaling=scaling), precision="32", **more,
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
    back, head = hf_model_config(folder, precision="32"), config.kv_channels
    for f in dataclasses.fields(config):
        dynamic = f.name == "encoder_seq_length" and "dynamic" in str(made["rope_parameters"])
        if dynamic:  # the file has its original length there
            assert getattr(back, f.name) == 999
        elif f.name == "attention_multiplier":
            assert (back.attention_multiplier or head**-0.5) == (config.attention_multiplier or head**-0.5)
        elif not f.name.startswith("window") and f.name != "no_rope_freq":
            assert getattr(back, f.name) == getattr(config, f.name), f.name
    assert back.layer_windows == config.layer_windows
    assert back.layers_without_rope == config.layers_without_rope
    # The only shape that Llama's own class refuses goes to Mistral's.
    assert made["model_type"] != "llama" or config.hidden_size % config.num_attention_heads == 0


@pytest.mark.parametrize(
    ("multiplier", "family"), [(1.0, "granite"), (0.3, "granite"), (0.25, "llama"), (None, "llama")]
)
def test_what_scores_are_multiplied_by_alone_makes_a_granite(multiplier, family):
    """But for the root that every family divides by."""
    made = make_hf_config(GPTModelConfig(2, 32, 2, 64, kv_channels=16, vocab_size=99, attention_multiplier=multiplier))
    assert made["model_type"] == family and made.get("attention_multiplier", 0.25) == (multiplier or 0.25)


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
        ({"softmax_type": "off-by-one"}, "model.softmax_type is off-by-one here and vanilla there"),
        (
            {"no_rope_freq": 2, "residual_multiplier": 2.0},
            "smollm3 cannot hold this model: model.residual_multiplier is 2.0",
        ),
        ({"position_embedding": PositionEmbedding(interleaved=True)}, "model.position_embedding is"),
    ],
)
def test_a_model_that_no_family_has_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make_hf_config(GPTModelConfig(4, 64, 4, 128, vocab_size=99, **changes))
