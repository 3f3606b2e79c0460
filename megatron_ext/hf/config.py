"""A Hugging Face config.json as our model's configuration, and back.

A key that changes what the model computes is either represented or refused, never ignored. Keys that a file leaves out
mean what transformers' class of that family assumes (`Family.defaults`; a test compares them with the classes).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.models.config import GPTModelConfig, PositionEmbedding
from megatron_ext.rotary import RopeScaling

__all__ = [
    "FAMILIES", "Family", "difference", "hf_model_config", "is_hf_folder", "make_hf_config", "read_hf_config", "read_json",
]  # fmt: skip

CONFIG_FILE = "config.json"
FULL, SLIDING = "full_attention", "sliding_attention"
# Ours by theirs, where a number is only renamed. Each must be in the file.
NUMBERS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "encoder_seq_length": "max_position_embeddings",
}
SHARED = {
    "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}  # fmt: skip
WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
# What our model computes; another value is refused.
ONLY = {
    "hidden_act": ("silu", "swish"), "attention_dropout": (0,), "attention_bias": (False,), "mlp_bias": (False,),
    "is_causal": (True,),
}  # fmt: skip
# transformers takes it from any family's file, though it is a field of none.
EVERYWHERE = {"is_causal"}
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
DEFAULT_ROPE = {"rope_theta": 10000.0}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
# Of no bearing on the logits.
NEUTRAL = {
    "architectures", "bos_token_id", "do_sample", "dtype", "eos_token_id", "id2label", "is_llama_config", "label2id",
    "max_length", "model_type", "pad_token_id", "pretraining_tp", "return_dict", "temperature", "tokenizer_class", "top_k",
    "top_p", "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model_type of transformers: its class, what it assumes for a missing key, and what of ours it always has."""

    architecture: str
    defaults: dict[str, Any]
    always: dict[str, bool] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", SHARED | {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False}
    ),
    "mistral": Family("MistralForCausalLM", SHARED | {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", SHARED | WINDOWED | {"num_key_value_heads": 32}, {"add_qkv_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        SHARED | WINDOWED | {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False},
        {"qk_layernorm": True},
    ),
}


def is_hf_folder(folder: str | Path) -> bool:
    """Whether the folder holds a model of transformers, of whatever family, told by its config.json.

    Raises:
        UserError: there is a config.json, and it is damaged.
    """
    path = Path(folder) / CONFIG_FILE
    return path.is_file() and "model_type" in read_json(path)


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The architecture that a folder's config.json describes, as fields of `GPTModelConfig` in plain data.

    `vocab_size` is the number of rows of the embedding, which may be more than the tokenizer's tokens.

    Raises:
        UserError: no config.json, another family, or anything in it that our model does not compute.
    """
    path = Path(folder) / CONFIG_FILE
    return _fields(read_json(path), str(path))


def hf_model_config(folder: str | Path, **changes: Any) -> GPTModelConfig:
    """The configuration of a folder's model, with other fields (parallel sizes, precision) as given."""
    fields = read_hf_config(folder)
    position = fields["position_embedding"]
    scaling = position["scaling"] and RopeScaling(**position["scaling"])
    fields["position_embedding"] = PositionEmbedding(**position | {"scaling": scaling})
    return GPTModelConfig(**fields | changes)


def difference(config: GPTModelConfig, fields: dict[str, Any], ignored: Iterable[str] = ()) -> str | None:
    """The first field that `read_hf_config` and the model's configuration do not share, in words.

    The longest sequence and the initial weights may differ; so may the position scheme: on text all agree.
    """
    ours = dataclasses.asdict(config)
    for name, theirs in fields.items():
        mine = ours[name]
        if name == "position_embedding":
            mine, theirs = mine | {"scheme": None}, theirs | {"scheme": None}
        elif name.startswith("window") and config.num_layers == fields["num_layers"]:
            # There are several ways to say which layers slide.
            windows = {key: fields[key] for key in ("window_size", "window_attn_skip_freq")}
            if config.layer_windows == dataclasses.replace(config, **windows).layer_windows:
                continue
        if name not in ("encoder_seq_length", "init_method_std", *ignored) and mine != theirs:
            return f"model.{name} is {mine} here and {theirs} there"
    return None


def make_hf_config(config: GPTModelConfig, special_tokens: dict[str, int] | None = None) -> dict[str, Any]:
    """A config.json for a model that never came from one.

    Args:
        special_tokens: e.g. {"eos_token_id": 2}.

    Raises:
        UserError: no family has such a model.
    """
    if config.qk_layernorm:
        name = "qwen3"
    elif config.add_qkv_bias:
        name = "qwen2"
    else:  # LlamaConfig wants hidden_size to divide by the heads even where head_dim is given
        name = (
            "llama"
            if config.window_size is None and config.hidden_size % config.num_attention_heads == 0
            else "mistral"
        )
    family, position = FAMILIES[name], config.position_embedding
    rope: dict[str, Any] = {"rope_theta": position.base, "rope_type": "default"}
    if position.scaling is not None:
        rope |= {"rope_type": "llama3"} | dataclasses.asdict(position.scaling)
    made = family.defaults | {theirs: getattr(config, ours) for ours, theirs in NUMBERS.items()}
    made |= {
        "architectures": [family.architecture],
        "model_type": name,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "rms_norm_eps": config.layernorm_epsilon,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "rope_parameters": rope,
    } | (special_tokens or {})
    if "sliding_window" in made:
        made["sliding_window"] = config.window_size and config.window_size[0] + 1
    if "layer_types" in made:
        made["use_sliding_window"] = config.window_size is not None
        made["layer_types"] = [FULL if w is None else SLIDING for w in config.layer_windows]
        made["max_window_layers"] = config.num_layers
    if wrong := difference(config, _fields(made, "the config.json made for it")):
        raise UserError(f"transformers' {name} cannot hold this model: {wrong}")
    return made


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: not there, or no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): name the folder of a Hugging Face model") from error
    except (ValueError, RecursionError) as error:  # brackets of thousands of levels
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; fetch it again")
    return found


def _fields(raw: dict[str, Any], where: str) -> dict[str, Any]:
    kind = raw.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(
            f"{where}: model_type={kind!r} is not read here, only {', '.join(FAMILIES)}; convert others with NVIDIA's "
            "megatron-bridge"
        )
    _refuse(raw, family, where)
    known = {*family.defaults, *NUMBERS.values(), *ROPE}
    config = family.defaults | {key: value for key, value in raw.items() if key in known}
    fields: dict[str, Any] = {ours: _integer(config, theirs, where) for ours, theirs in NUMBERS.items()}
    for ours, theirs in (("num_query_groups", "num_key_value_heads"), ("kv_channels", "head_dim")):
        fields[ours] = None if config[theirs] is None else _integer(config, theirs, where)
    _complete_heads(fields, where)
    window, skip = _windows(config, fields["num_layers"], where)
    return fields | {
        "share_embeddings_and_output_weights": _switch(config, "tie_word_embeddings", where),
        "add_qkv_bias": family.always.get("add_qkv_bias", False),
        "qk_layernorm": family.always.get("qk_layernorm", False),
        "layernorm_epsilon": _number(config, "rms_norm_eps", where),
        "init_method_std": _number(config, "initializer_range", where),
        "position_embedding": dataclasses.asdict(_position(config, where)),
        "window_size": window,
        "window_attn_skip_freq": skip,
        "attn_logit_softcapping": None,
        "vision": None,
    }


def _complete_heads(fields: dict[str, Any], where: str) -> None:
    """Fill in what the file leaves out about heads, and refuse heads that cannot be."""
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    groups = fields["num_query_groups"] = fields["num_query_groups"] or heads
    if heads % groups:
        raise UserError(
            f"{where}: num_attention_heads={heads} is not divisible by num_key_value_heads={groups}; fetch the file again"
        )
    if fields["kv_channels"] is None and hidden % heads:
        raise UserError(
            f"{where}: hidden_size={hidden} is not divisible by num_attention_heads={heads}, and there is no head_dim; "
            "fetch the file again"
        )
    fields["kv_channels"] = fields["kv_channels"] or hidden // heads
    if fields["kv_channels"] % 2:
        raise UserError(
            f"{where}: the head size {fields['kv_channels']} (head_dim, or hidden_size by num_attention_heads) must be "
            "even, rotary positions turn pairs; fetch the file again"
        )


def _refuse(raw: dict[str, Any], family: Family, where: str) -> None:
    """Refuse what our model does not compute."""
    architectures = raw.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(
            f"{where}: architectures={architectures} is no language model of model_type={raw['model_type']}, which is "
            f"{family.architecture}; choose a folder with such a model"
        )
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantised weights (quantization_config) are not read; take the model without them")
    for key, values in ONLY.items():
        if key in family.defaults.keys() | EVERYWHERE and raw.get(key, values[0]) not in values:
            raise UserError(f"{where}: {key}={raw[key]!r} is not supported, only {values[0]!r}; choose another model")
    known = {*family.defaults, *NUMBERS.values(), *ROPE, *NEUTRAL, *EVERYWHERE}
    for key, value in raw.items():
        if key not in known and not key.startswith(("_", "unsloth_")) and value is not None and value is not False:
            raise UserError(
                f"{where}: {key}={str(value)[:80]} is not known of {raw['model_type']}; if the model computes the same "
                "without it, take it out of the file"
            )


def _integer(config: dict[str, Any], key: str, where: str, least: int = 1) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{where}: {key} must be an integer of at least {least}, got {value!r}; fetch the file again")
    return value


def _number(config: dict[str, Any], key: str, where: str) -> float:
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise UserError(f"{where}: {key} must be a number of at least 0, got {value!r}; fetch the file again")
    return value


def _switch(config: dict[str, Any], key: str, where: str) -> bool:
    value = config[key]
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} must be true or false, got {value!r}; fetch the file again")
    return value


def _windows(config: dict[str, Any], layers: int, where: str) -> tuple[list[int] | None, list[int] | None]:
    """(model.window_size, model.window_attn_skip_freq)."""
    types = config.get("layer_types")
    if types is not None and (
        not isinstance(types, list) or len(types) != layers or any(t not in (FULL, SLIDING) for t in types)
    ):
        raise UserError(
            f"{where}: layer_types must name {FULL} or {SLIDING} for each of {layers} layers, got {str(types)[:80]}; choose "
            "another model"
        )
    in_use = "use_sliding_window" not in config or _switch(config, "use_sliding_window", where)
    if config.get("sliding_window") is None or not in_use:
        if SLIDING in (types or ()):
            raise UserError(f"{where}: layer_types has {SLIDING}, but no sliding window is in use; correct one")
        return None, None
    window = [_integer(config, "sliding_window", where) - 1, 0]  # theirs counts the query itself
    if "layer_types" not in config:  # Mistral: all layers slide
        return window, None
    if types is None:
        full = _integer(config, "max_window_layers", where, least=0)
        types = [SLIDING if layer >= full else FULL for layer in range(layers)]
    skip = [int(t == SLIDING) for t in types]
    if not any(skip):
        return None, None
    return window, None if all(skip) else skip


def _position(config: dict[str, Any], where: str) -> PositionEmbedding:
    """transformers 5 writes rope_parameters; before, it was rope_theta beside rope_scaling, which still comes first."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(
            f"{where}: rope_scaling or rope_parameters must be an object, got {rope!r}; fetch the file again"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope_type={kind!r} is not supported, only default and llama3; choose another model")
    for source in (rope, config):
        if source.get("partial_rotary_factor") not in (None, 1):
            raise UserError(
                f"{where}: partial_rotary_factor={source['partial_rotary_factor']} is not supported, only 1"
            )
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    if unknown := sorted(rope.keys() - known - ({*LLAMA3} if kind == "llama3" else set())):
        raise UserError(f"{where}: {unknown[0]} is not known of rope_type={kind!r}; choose another model")
    theta = next((source for source in (rope, config) if source.get("rope_theta") is not None), DEFAULT_ROPE)
    base = _number(theta, "rope_theta", where)
    if base == 0:
        raise UserError(f"{where}: rope_theta must be more than 0, got {base}; fetch the file again")
    if kind == "default":
        return PositionEmbedding(base=base)
    original = "original_max_position_embeddings"
    if config.get(original) not in (None, rope.get(original)):
        raise UserError(f"{where}: {original} stands beside the rope's own, which is {rope.get(original)}; correct one")
    length = _integer(*((config, "max_position_embeddings") if original not in rope else (rope, original)), where)
    factors = [_number(rope, key, where) for key in LLAMA3]
    try:
        scaling = RopeScaling(*factors, length)
    except ValueError as error:
        raise UserError(f"{where}: rope_type='llama3' with {error}; fetch the file again") from error
    return PositionEmbedding(base=base, scaling=scaling)
