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
from megatron_ext.hf.experts import read_experts, write_experts
from megatron_ext.hf.families import (
    EVERYWHERE,
    FAMILIES,
    FULL,
    NEUTRAL,
    NUMBERS,
    OLD_FULL,
    ONLY,
    SAME_AS,
    SLIDING,
    Family,
    family_of,
)
from megatron_ext.hf.multimodal import MULTIMODAL, make_multimodal, read_vision
from megatron_ext.hf.quantised import check_quantisation
from megatron_ext.hf.raw import integer, number, read_json, switch
from megatron_ext.hf.rope import ROPE, read_position, write_scaling
from megatron_ext.models.config import ARCHITECTURE, PLAIN, GPTModelConfig, PositionEmbedding, vision_difference
from megatron_ext.rotary import RopeScaling, find_scheme
from megatron_ext.vision import VisionConfig

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
    return _whole(read_json(path), Path(folder), str(path))


def _whole(raw: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Fields of a language model, or of one with eyes."""
    if str(raw.get("model_type")) not in MULTIMODAL:
        return _fields(raw, where)
    text, vision, scheme = read_vision(raw, folder, where)
    fields = _fields(text, f"{where}: text_config") | {"vision": vision}
    fields["position_embedding"]["scheme"] = scheme
    if find_scheme(scheme).arrangement is None:
        fields["position_embedding"]["sections"] = None
    return fields


def hf_model_config(folder: str | Path, **changes: Any) -> GPTModelConfig:
    """The configuration of a folder's model, with other fields (parallel sizes, precision) as given."""
    fields = read_hf_config(folder)
    position = fields["position_embedding"]
    scaling = position["scaling"] and RopeScaling(**position["scaling"])
    fields["position_embedding"] = PositionEmbedding(**position | {"scaling": scaling})
    fields["vision"] = fields["vision"] and VisionConfig(**fields["vision"])
    return GPTModelConfig(**fields | changes)


def difference(config: GPTModelConfig, fields: dict[str, Any], ignored: Iterable[str] = ()) -> str | None:
    """The first field that `read_hf_config` and the model's configuration do not share, in words.

    The longest sequence and the initial weights may differ; so may the position scheme and its sections: on text all agree.
    """
    ours = dataclasses.asdict(config)
    for name, theirs in fields.items():
        mine = ours[name]
        if name == "vision" and name not in ignored:
            if found := vision_difference(mine, theirs):
                return found
            continue
        if name == "position_embedding":
            mine, theirs = mine | ANY_SCHEME, theirs | ANY_SCHEME
        elif name == "attention_multiplier":
            mine, theirs = (value or config.kv_channels**-0.5 for value in (mine, theirs))
        elif name == "no_rope_freq" and config.num_layers == fields["num_layers"]:
            mine = config.layers_without_rope
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
    text = _make_text_config(config, special_tokens)
    if config.vision is None:
        return text
    position = config.position_embedding
    pairs = position.pairs(config.kv_channels)
    rest = pairs - pairs // 4
    made = make_multimodal(config.vision, text, position.sections or [pairs // 4, rest // 2, rest - rest // 2])
    there = "the config.json made for it"
    if wrong := difference(config, _whole(made, Path(), there)):
        raise UserError(f"transformers' {made['model_type']} cannot hold this model: {wrong}")
    return made


def _make_text_config(config: GPTModelConfig, special_tokens: dict[str, int] | None) -> dict[str, Any]:
    name = family_of(config)
    family, position = FAMILIES[name], config.position_embedding
    rope: dict[str, Any] = {"rope_theta": position.base, "rope_type": "default"}
    if position.scaling is not None:
        rope |= write_scaling(position.scaling)
    if family.rotated is not None:
        rope["partial_rotary_factor"] = position.percent
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
    made |= write_experts(family, config)
    if "sliding_window" in made:
        made["sliding_window"] = config.window_size and config.window_size[0] + 1
    if "layer_types" in made:
        made["use_sliding_window"] = config.window_size is not None
        made["layer_types"] = [FULL if w is None else SLIDING for w in config.layer_windows]
        if "max_window_layers" in made:
            made["max_window_layers"] = config.num_layers
    elif "use_sliding_window" in made:
        made["use_sliding_window"] = config.window_size is not None
    if "no_rope_layers" in made:
        made["no_rope_layers"] = [1 - x for x in config.layers_without_rope]
    for ours, theirs in (family.integers | family.switches).items():
        made[theirs] = getattr(config, ours)
    if config.multi_latent_attention:
        if "rope_interleave" in family.defaults:
            made["rope_interleave"] = position.interleaved
        del made["head_dim"]  # transformers' own, of another meaning
    for ours, theirs in family.numbers.items():
        made[theirs] = getattr(config, ours) or config.kv_channels**-0.5
    if position.scaling is not None and position.scaling.rope_type == "dynamic":  # where its original length stands
        made["max_position_embeddings"] = position.scaling.original_max_position_embeddings
    if wrong := difference(config, _fields(made, "the config.json made for it"), ignored=("vision",)):
        raise UserError(f"transformers' {name} cannot hold this model: {wrong}")
    return made


def _fields(raw: dict[str, Any], where: str) -> dict[str, Any]:
    kind = raw.get("model_type")
    family = FAMILIES.get(SAME_AS.get(kind, kind)) if isinstance(kind, str) else None
    if family is None:
        raise UserError(
            f"{where}: model_type={kind!r} is not read here, only {', '.join((*FAMILIES, *SAME_AS, *MULTIMODAL))}; convert "
            "others with NVIDIA's megatron-bridge"
        )
    raw = {family.synonyms.get(key, key): value for key, value in raw.items()}
    _refuse(raw, family, where)
    known = {*family.defaults, *ROPE}
    config = family.defaults | {key: value for key, value in raw.items() if key in known}
    fields: dict[str, Any] = {ours: integer(config, theirs, where) for ours, theirs in NUMBERS.items()}
    renamed = {"num_query_groups": "num_key_value_heads", "kv_channels": "head_dim"} | family.integers
    for ours, theirs in renamed.items():
        fields[ours] = None if config.get(theirs) is None else integer(config, theirs, where)
    if family.always.get("multi_latent_attention"):
        _complete_latent(fields, where)
        fields["latent_layernorm_epsilon"] = (
            None if config["rms_norm_eps"] == family.latent_epsilon else family.latent_epsilon
        )
    _complete_heads(fields, where)
    said = (
        {} if any(config.get(key) for key in ("rope_scaling", "rope_parameters")) else {"rope_parameters": family.rope}
    )
    position = read_position(config | said, where, family.theta, family.rotated)
    position.interleaved = family.interleaved
    if "rope_interleave" in config:
        position.interleaved = switch(config, "rope_interleave", where)
    turned = fields["qk_pos_emb_head_dim" if family.always.get("multi_latent_attention") else "kv_channels"]
    if position.sections is not None and sum(position.sections) != position.pairs(turned):
        raise UserError(
            f"{where}: mrope_section={position.sections} does not add up to the {position.pairs(turned)} pairs of a head of "
            f"{turned}; fetch the file again"
        )
    window, skip = _windows(config, fields["num_layers"], where, family.slides)
    return (
        PLAIN
        | fields
        | {
            "share_embeddings_and_output_weights": switch(config, "tie_word_embeddings", where),
            **family.always,
            **{ours: switch(config, theirs, where) for ours, theirs in family.switches.items()},
            **_multipliers(config, family, fields["kv_channels"], where),
            "no_rope_freq": _without_rope(config, fields["num_layers"], where),
            **read_experts(family, config, fields["num_layers"], where),
            "layernorm_epsilon": number(config, "rms_norm_eps", where),
            "init_method_std": _deviation(config, family, fields["hidden_size"], where),
            "position_embedding": dataclasses.asdict(position),
            "window_size": window,
            "window_attn_skip_freq": skip,
        }
    )


def _deviation(config: dict[str, Any], family: Family, hidden: int, where: str) -> float:
    """Of new weights; Youtu's class has a rule where a file says nothing."""
    if config["initializer_range"] is family.defaults["initializer_range"] is None:
        return 2 / (5 * hidden) ** 0.5
    return number(config, "initializer_range", where)


def _complete_latent(fields: dict[str, Any], where: str) -> None:
    """The head size of latent attention."""
    for ours in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
        if fields[ours] is None:
            raise UserError(f"{where}: the sizes of latent attention must be integers, got null; fetch the file again")
    fields["kv_channels"] = fields["qk_head_dim"] + fields["qk_pos_emb_head_dim"]
    if fields["num_query_groups"] not in (None, fields["num_attention_heads"]):
        raise UserError(
            f"{where}: num_key_value_heads={fields['num_query_groups']} is not supported with latent attention, only "
            f"{fields['num_attention_heads']}; fetch the file again"
        )


def _multipliers(config: dict[str, Any], family: Family, head: int, where: str) -> dict[str, float | None]:
    found = {ours: float(number(config, theirs, where)) for ours, theirs in family.numbers.items()}
    for name, value in found.items():
        if value == 0:
            raise UserError(f"{where}: {family.numbers[name]} must be more than 0; fetch the file again")
    if found.get("attention_multiplier") == head**-0.5:  # as everywhere
        found["attention_multiplier"] = None
    return found


def _rotating(config: dict[str, Any], layers: int, where: str) -> list[int] | None:
    """Of each layer 1 where it rotates; None: of a family whose layers all do."""
    if "no_rope_layers" not in config:
        return None
    given, every = config["no_rope_layers"], config["no_rope_layer_interval"]
    if given is None:
        every = integer(config, "no_rope_layer_interval", where)
        return [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(x not in (0, 1) for x in given):
        raise UserError(
            f"{where}: no_rope_layers must be 0 or 1 for each of {layers} layers, got {str(given)[:80]}; fetch the file again"
        )
    return [int(x) for x in given[:layers]]


def _without_rope(config: dict[str, Any], layers: int, where: str) -> list[int] | None:
    """model.no_rope_freq."""
    rotating = _rotating(config, layers, where)
    return None if rotating is None or all(rotating) else [1 - x for x in rotating]


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
    check_quantisation(raw, where)
    for key, values in (ONLY | family.only).items():
        asked = key in family.defaults.keys() | EVERYWHERE | family.only.keys() and key not in family.idle
        if asked and raw.get(key, values[0]) not in values:
            raise UserError(f"{where}: {key}={raw[key]!r} is not supported, only {values[0]!r}; choose another model")
    known = {*family.defaults, *family.only, *ROPE, *NEUTRAL, *EVERYWHERE, *family.idle, *_idle(raw, family)}
    known.add("quantization_config")  # looked at above
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


def _windows(
    config: dict[str, Any], layers: int, where: str, every: int | None = None
) -> tuple[list[int] | None, list[int] | None]:
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
    if types is None and every is not None:
        types = [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]
    if types is None:
        full = integer(config, "max_window_layers", where, least=0) if "max_window_layers" in config else 0
        rotating = _rotating(config, layers, where) or [0] * layers  # SmolLM3's slide where they do not rotate
        types = [SLIDING if layer >= full and not rotating[layer] else FULL for layer in range(layers)]
    skip = [int(t == SLIDING) for t in types]
    if not any(skip):
        return None, None
    return window, None if all(skip) else skip
