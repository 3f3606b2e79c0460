"""A Hugging Face config.json as our model's configuration, and back.

A key that changes what the model computes is either represented or refused, never ignored. Keys that a file leaves out
mean what transformers' class of that family assumes (`Family.defaults`; a test compares them with the classes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.hf.families import EVERYWHERE, FAMILIES, FULL, NEUTRAL, NUMBERS, OLD_FULL, ONLY, SLIDING, Family
from megatron_ext.hf.raw import integer, number, read_json, switch
from megatron_ext.hf.rope import ROPE, read_position
from megatron_ext.models.config import ARCHITECTURE, PLAIN, GPTModelConfig, PositionEmbedding
from megatron_ext.rotary import RopeScaling

__all__ = [
    "ANY_SCHEME", "CONFIG_FILE", "difference", "hf_model_config", "is_hf_folder", "make_hf_config", "read_hf_config",
]  # fmt: skip

CONFIG_FILE = "config.json"
# Of position_embedding: on text all schemes agree, however they divide their pairs.
ANY_SCHEME = {"scheme": None, "sections": None}


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

    The longest sequence and the initial weights may differ; so may the position scheme and its sections: on text all agree.
    """
    ours = dataclasses.asdict(config)
    for name, theirs in fields.items():
        mine = ours[name]
        if name == "position_embedding":
            mine, theirs = mine | ANY_SCHEME, theirs | ANY_SCHEME
        elif name.startswith("window") and config.num_layers == fields["num_layers"]:
            # There are several ways to say which layers slide.
            windows = {key: fields[key] for key in ("window_size", "window_attn_skip_freq")}
            if config.layer_windows == dataclasses.replace(config, **windows).layer_windows:
                continue
        if name in ARCHITECTURE and name not in ignored and mine != theirs:
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


def _fields(raw: dict[str, Any], where: str) -> dict[str, Any]:
    kind = raw.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(
            f"{where}: model_type={kind!r} is not read here, only {', '.join(FAMILIES)}; convert others with NVIDIA's "
            "megatron-bridge"
        )
    _refuse(raw, family, where)
    known = {*family.defaults, *ROPE}
    config = family.defaults | {key: value for key, value in raw.items() if key in known}
    fields: dict[str, Any] = {ours: integer(config, theirs, where) for ours, theirs in NUMBERS.items()}
    for ours, theirs in (("num_query_groups", "num_key_value_heads"), ("kv_channels", "head_dim")):
        fields[ours] = None if config[theirs] is None else integer(config, theirs, where)
    _complete_heads(fields, where)
    position = read_position(config, where)
    if position.sections is not None and sum(position.sections) != position.pairs(fields["kv_channels"]):
        raise UserError(
            f"{where}: mrope_section={position.sections} does not add up to the {position.pairs(fields['kv_channels'])} pairs of "
            f"a head of {fields['kv_channels']}; fetch the file again"
        )
    window, skip = _windows(config, fields["num_layers"], where)
    return (
        PLAIN
        | fields
        | {
            "share_embeddings_and_output_weights": switch(config, "tie_word_embeddings", where),
            "add_qkv_bias": family.always.get("add_qkv_bias", False),
            "qk_layernorm": family.always.get("qk_layernorm", False),
            "layernorm_epsilon": number(config, "rms_norm_eps", where),
            "init_method_std": number(config, "initializer_range", where),
            "position_embedding": dataclasses.asdict(position),
            "window_size": window,
            "window_attn_skip_freq": skip,
        }
    )


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
    # The body alone is a model with its embedding tied; which of its tensors there are is seen by their headers.
    fitting = ([family.architecture.lower()], [family.architecture.replace("ForCausalLM", "Model").lower()])
    if [str(name).lower() for name in architectures] not in fitting:  # in 2023: LLaMAForCausalLM
        raise UserError(
            f"{where}: architectures={architectures} is no language model of model_type={raw['model_type']}, which is "
            f"{family.architecture}; choose a folder with such a model"
        )
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantised weights (quantization_config) are not read; take the model without them")
    for key, values in ONLY.items():
        if key in family.defaults.keys() | EVERYWHERE and raw.get(key, values[0]) not in values:
            raise UserError(f"{where}: {key}={raw[key]!r} is not supported, only {values[0]!r}; choose another model")
    known = {*family.defaults, *ROPE, *NEUTRAL, *EVERYWHERE, *_idle(raw, family)}
    for key, value in raw.items():
        nothing = value is None or value is False or value in ([], {})
        if key not in known and not key.startswith(("_", "unsloth_")) and not nothing:
            raise UserError(
                f"{where}: {key}={str(value)[:80]} is not known of {raw['model_type']}; if the model computes the same "
                "without it, take it out of the file"
            )


def _idle(raw: dict[str, Any], family: Family) -> set[str]:
    """Keys of windows that are not the family's, and that say what it does anyway."""
    slides = (
        "sliding_window" in family.defaults and raw.get("sliding_window", family.defaults["sliding_window"]) is not None
    )
    idle = {"use_sliding_window"} if slides else {"max_window_layers"}
    if "sliding_window" not in family.defaults and raw.get("use_sliding_window") is False:
        idle.add("sliding_window")
    types = raw.get("layer_types")
    if isinstance(types, list) and all(kind in ((SLIDING,) if slides else (FULL, OLD_FULL)) for kind in types):
        idle.add("layer_types")
    return idle


def _windows(config: dict[str, Any], layers: int, where: str) -> tuple[list[int] | None, list[int] | None]:
    """(model.window_size, model.window_attn_skip_freq)."""
    types = config.get("layer_types")
    if isinstance(types, list):
        types = [FULL if kind == OLD_FULL else kind for kind in types]
    if types is not None and (
        not isinstance(types, list) or len(types) != layers or any(t not in (FULL, SLIDING) for t in types)
    ):
        raise UserError(
            f"{where}: layer_types must name {FULL} or {SLIDING} for each of {layers} layers, got {str(types)[:80]}; choose "
            "another model"
        )
    in_use = "use_sliding_window" not in config or switch(config, "use_sliding_window", where)
    if config.get("sliding_window") is None or not in_use:
        if SLIDING in (types or ()):
            raise UserError(f"{where}: layer_types has {SLIDING}, but no sliding window is in use; correct one")
        return None, None
    window = [integer(config, "sliding_window", where) - 1, 0]  # theirs counts the query itself
    if "layer_types" not in config:  # Mistral: all layers slide
        return window, None
    if types is None:
        full = integer(config, "max_window_layers", where, least=0)
        types = [SLIDING if layer >= full else FULL for layer in range(layers)]
    skip = [int(t == SLIDING) for t in types]
    if not any(skip):
        return None, None
    return window, None if all(skip) else skip
