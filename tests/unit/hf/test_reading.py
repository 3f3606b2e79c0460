"""What transformers reads, we read: drawn spellings of a config.json, drawn ways to store its tensors, the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_ext.errors import UserError
from megatron_ext.hf import hf_model_config, load_hf_weights, read_hf_config
from megatron_ext.hf.families import FAMILIES
from megatron_ext.models import build_gpt
from megatron_ext.models.prompt_streams import text_logits
from tests.hf_models import hf_logits

LAYERS, VOCAB, BOUND = 2, 37, 1e-4
BASE = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "initializer_range": 0.3, "rms_norm_eps": 1e-5, "pad_token_id": None,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 6,
    "first_k_dense_replace": LAYERS, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 0,
}  # fmt: skip
ROUTED = ("first_k_dense_replace", "num_nextn_predict_layers")
EMBEDDING, OUTPUT, INDEX = "model.embed_tokens.weight", "lm_head.weight", "model.safetensors.index.json"
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope", "factor": 3.0, "original_max_position_embeddings": 64, "short_factor": [1.0, 1.5, 2.0, 4.0],
    "long_factor": [4.0, 4.0, 6.0, 9.0],
}  # fmt: skip
ABSENT = "absent"
# Spellings of many years and tools, by key; each is read by transformers and leaves a model that ours can be.
SPELLINGS: dict[str, list[Any]] = {
    "num_key_value_heads": [ABSENT, 1, 4],
    "head_dim": [ABSENT, 16],
    "architectures": [ABSENT, None, [], "causal", "body", "2023"],
    "rope_theta": [ABSENT, 7e5, 500],
    "rope_scaling": [
        ABSENT, None, {}, {"type": "default"}, {"rope_type": "default", "rope_theta": 3e4, "factor": None},
        {"rope_type": "llama3", **LLAMA3}, {"type": "llama3", **LLAMA3, "rope_theta": 2e4},
        {"rope_type": "default", "factor": 1.0, "type": "linear"}, {"type": "linear", "factor": 1.0},
        {"rope_type": "default", "mrope_section": [1, 2, 1]},
        {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
        {"type": "linear", "factor": 2.5}, {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 2.0},
        {"type": "yarn", "factor": 4, "mscale": 0.7, "mscale_all_dim": 2.0, "truncate": False, "rope_theta": 3e4},
        LONGROPE,
    ],
    "rope_parameters": [
        ABSENT, None, {"rope_theta": 2e4}, {"rope_theta": 2e4, "rope_type": "llama3", **LLAMA3}, LONGROPE,
        {"rope_theta": 2e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.8},
    ],
    "partial_rotary_factor": [ABSENT, None, 1.0],
    "tie_word_embeddings": [ABSENT, True, False],
    "attention_bias": [ABSENT, False],
    "attention_dropout": [ABSENT, 0, 0.0],
    "hidden_act": [ABSENT, "silu", "swish"],
    "sliding_window": [ABSENT, None, 5],
    "use_sliding_window": [ABSENT, False, True],
    "max_window_layers": [ABSENT, 0, 1, 28],
    "layer_types": [ABSENT, None, "full", "attention", "sliding"],
    "dtype": [ABSENT, None, "bfloat16"],
    "torch_dtype": [ABSENT, None, "float16"],
    "chunk_size_feed_forward": [ABSENT, 0],
    "pruned_heads": [ABSENT, {}],
    "quantization_config": [ABSENT, None],
    "is_decoder": [ABSENT, True],
    "output_hidden_states": [ABSENT, True],
    "attn_implementation": [ABSENT, "sdpa"],
    "_attn_implementation": [ABSENT, "eager"],
    "num_labels": [ABSENT, 2],
    "repetition_penalty": [ABSENT, 1.1],
    "no_repeat_ngram_size": [ABSENT, 0],
}  # fmt: skip
# Ways to store the tensors; the first two only of a tied model.
STORED = ("head alone", "both", "one file", "shards", "body alone", "with frequencies", "an index that is out of date")

# Of those with experts one dense family has the spellings, and test_experts.py the rest.
DENSE = [name for name, family in FAMILIES.items() if not family.experts or name == "deepseek_v3"]


def write_config(folder: Path, family: str, **changes: Any) -> None:
    name = FAMILIES[family].architecture
    words = {
        "causal": [name], "body": [name.replace("ForCausalLM", "Model")], "2023": [name.upper()],
        "full": ["full_attention"] * LAYERS, "attention": ["attention"] * LAYERS,
        "sliding": ["sliding_attention"] * LAYERS,
    }  # fmt: skip
    raw = {"model_type": family} | BASE
    if family in ("deepseek_v3", "youtu"):
        raw |= LATENT if family == "deepseek_v3" else {k: v for k, v in LATENT.items() if k not in ROUTED}
    for key, value in changes.items():
        raw[key] = words.get(value, value) if isinstance(value, str) else value
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != ABSENT}))


def random_tensors(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Those of the model that transformers makes of the config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)), dtype=torch.float32)
        model(torch.tensor([[1, 2, 3]]))  # some are made and cannot run
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return {name: 1 + 0.3 * torch.randn(t.shape) if t.dim() == 1 else t for name, t in state.items()}


def store(folder: Path, tensors: dict[str, torch.Tensor], way: str, tied: bool) -> None:
    if tied and way != "both":
        del tensors[EMBEDDING if way == "head alone" else OUTPUT]
    if way == "body alone":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if way == "with frequencies":
        tensors |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(LAYERS)}
    if way not in ("shards", "an index that is out of date"):
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, str(folder / file), metadata={"format": "pt"})
    places = {name: file for file, some in files.items() for name in some}
    if way != "shards":  # it promises a tensor that is nowhere, forgets one, and looks for one in the other file
        del places[names[2]]
        places |= {names[0]: "b.safetensors", "model.rotary_emb.inv_freq": "a.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def same_logits(folder: Path, world: torch.device) -> None:
    """Ours and transformers', behind every token of a text."""
    text = torch.randint(VOCAB, (19,), generator=torch.Generator().manual_seed(3)).tolist()
    model = build_gpt(hf_model_config(folder, precision="32"), world)
    load_hf_weights(folder, model)
    (expected,) = hf_logits(folder, [text])
    assert expected.std() > 0.1 and (text_logits(model, text) - expected).abs().max() <= BOUND


@pytest.mark.parametrize("family", DENSE)
@settings(max_examples=15, phases=[Phase.generate])
@given(data=st.data())
def test_a_drawn_file_computes_what_it_computes_in_transformers(tmp_path_factory, world, family, data):
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("drawn")
    keys = data.draw(st.lists(st.sampled_from(sorted(SPELLINGS)), max_size=4, unique=True), "keys")
    changes = {key: data.draw(st.sampled_from(SPELLINGS[key]), key) for key in keys}
    if family in ("deepseek_v3", "youtu"):  # of which one number is read
        changes.pop("num_key_value_heads", None)
    write_config(folder, family, **changes)
    try:
        config = AutoConfig.from_pretrained(str(folder))
        tensors = random_tensors(folder, data.draw(st.integers(0, 99), "seed"))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # transformers cannot run it
        return
    try:
        read_hf_config(folder)
    except UserError as error:  # only what contradicts itself, and says so
        assert any(word in str(error) for word in ("is not known of", "correct one", "must name", "add up")), error
        assert contradicts(family, changes), error
        return
    tied = config.tie_word_embeddings
    store(folder, tensors, data.draw(st.sampled_from(STORED if tied else STORED[2:]), "stored"), tied)
    same_logits(folder, world)


def contradicts(family: str, changes: dict[str, Any]) -> bool:
    """Whether a file asks for windows that its class does not make, or the other way round; or for sections of a smaller head."""
    rope = changes.get("rope_scaling")
    if changes.get("head_dim") == 16 and isinstance(rope, dict) and "mrope_section" in rope:
        return True
    window = changes.get("sliding_window", ABSENT) not in (None, ABSENT)
    types, asked = changes.get("layer_types", ABSENT), changes.get("use_sliding_window") is True
    if family in ("llama", "seed_oss", "granite", "deepseek_v3", "youtu"):
        return window or asked or types == "sliding"
    if family == "smollm3" and window and "max_window_layers" in changes:
        return True
    if family in ("mistral", "ministral"):
        slides = changes.get("sliding_window", ABSENT) is not None
        return types == ("full" if slides else "sliding") or types == "attention" or (slides or asked)
    return types == "sliding"


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("way", STORED)
@pytest.mark.parametrize("tied", [True, False])
def test_every_way_to_store_a_model_is_read(tmp_path, world, family, way, tied):
    if not tied and way in STORED[:2]:
        return
    write_config(tmp_path, family, tie_word_embeddings=tied)
    store(tmp_path, random_tensors(tmp_path, 5), way, tied)
    same_logits(tmp_path, world)


@pytest.mark.parametrize("family", DENSE)
def test_a_file_that_says_everything_means_the_same(tmp_path, family):
    """Every key of transformers' object, also those of how it generates; and those that its fourth version had."""
    from transformers import AutoConfig

    write_config(tmp_path, family, sliding_window=None)
    expected = read_hf_config(tmp_path)
    everything = AutoConfig.from_pretrained(str(tmp_path)).to_dict()
    generation = {
        "do_sample": True, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0,
        "temperature": 0.7, "top_k": 50, "top_p": 0.9, "typical_p": 1.0, "repetition_penalty": 1.1, "length_penalty": 1.0,
        "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1, "max_length": 20,
        "min_length": 0, "output_scores": False, "return_dict_in_generate": False, "remove_invalid_values": False,
    }  # fmt: skip
    of_old = {
        "torchscript": False, "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}, "is_decoder": False,
        "is_encoder_decoder": False, "cross_attention_hidden_size": None, "add_cross_attention": False, "prefix": None,
        "tie_encoder_decoder": False, "finetuning_task": None, "task_specific_params": None, "torch_dtype": "float32",
        "_name_or_path": "x", "sep_token_id": None, "decoder_start_token_id": None, "problem_type": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(of_old | generation | everything, default=str))
    assert read_hf_config(tmp_path) == expected


def refused(folder: Path, world: torch.device, words: str) -> None:
    model = build_gpt(hf_model_config(folder, precision="32"), world)
    with pytest.raises(UserError, match=words) as caught:
        load_hf_weights(folder, model)
    assert str(folder) in str(caught.value)


def save(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file({name: t.clone() for name, t in tensors.items()}, str(folder / name), metadata={"format": "pt"})


def test_a_head_that_is_missing_or_another_than_its_tied_embedding(tmp_path, world):
    """transformers makes up the first, and takes the second for tied or not by its version."""
    write_config(tmp_path, "llama", tie_word_embeddings=False)
    tensors = random_tensors(tmp_path, 1)
    head = tensors.pop(OUTPUT)
    for some in (tensors, {name.removeprefix("model."): tensor for name, tensor in tensors.items()}):
        save(tmp_path, some)
        refused(tmp_path, world, "lacks lm_head.weight, and tie_word_embeddings is false; set that to true if")
    save(tmp_path, {name: t for name, t in tensors.items() if name != EMBEDDING} | {OUTPUT: head})
    refused(tmp_path, world, r"lacks model.embed_tokens.weight .of 1.; fetch both again")
    write_config(tmp_path, "llama", tie_word_embeddings=True)
    save(tmp_path, tensors | {OUTPUT: head})
    refused(
        tmp_path, world, "lm_head.weight is not model.embed_tokens.weight, and which one is meant .* else remove lm_he"
    )
    save(tmp_path, tensors | {OUTPUT: tensors[EMBEDDING].double()})  # the same numbers
    same_logits(tmp_path, world)


@pytest.mark.parametrize(
    "extra", ["mlp.up_proj.weight_scale", "mlp.up_proj.weight_scale_inv", "mlp.up_proj.qweight", "mlp.up_proj.SCB"]
)
def test_quantised_weights_are_named_as_such(tmp_path, world, extra):
    write_config(tmp_path, "llama")
    save(tmp_path, random_tensors(tmp_path, 1) | {f"model.layers.0.{extra}": torch.ones(3)})
    refused(tmp_path, world, rf"has model.layers.0.{extra} .of 1 such.: quantised weights are not read, take the model")


def test_a_tensor_that_is_there_twice(tmp_path, world):
    write_config(tmp_path, "llama")
    tensors = random_tensors(tmp_path, 1)
    save(tmp_path, tensors | {"norm.weight": tensors["model.norm.weight"]})
    refused(tmp_path, world, "holds model.norm.weight twice, in model.safetensors and in model.safetensors; fetch the")


def test_sections_of_a_decoder_of_images(tmp_path):
    """They are the file's, whatever a formula would give."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [3, 1, 0]}
    for more, scheme in (({}, "mrope"), ({"mrope_interleaved": True}, "mrope_interleaved")):
        for spelling in (rope | more, rope | more | {"rope_type": "mrope"}, rope | more | {"type": "mrope"}):
            write_config(tmp_path, "qwen2", rope_scaling=spelling)
            position = read_hf_config(tmp_path)["position_embedding"]
            assert (position["scheme"], position["sections"], position["base"]) == (scheme, [3, 1, 0], 1e6)
            assert hf_model_config(tmp_path, precision="32").position_embedding.sections == [3, 1, 0]
    for change, words in (
        ({"mrope_section": [3, 1]}, r"mrope_section must be three integers, got \[3, 1\]"),
        ({"mrope_section": [3, 1, 0.0]}, "must be three integers"),
        ({"mrope_section": [16, 24, 24]}, r"\[16, 24, 24\] does not add up to the 4 pairs of a head of 8"),
        ({"mrope_interleaved": 1}, "mrope_interleaved must be true or false, got 1"),
    ):
        write_config(tmp_path, "qwen2", rope_scaling=rope | change)
        with pytest.raises(UserError, match=words):
            read_hf_config(tmp_path)
