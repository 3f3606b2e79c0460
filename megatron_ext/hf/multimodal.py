"""A config.json of a model that sees: the language model's in it, its eyes, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.hf.eyes import read_preprocessing
from megatron_ext.hf.families import EVERYWHERE, NEUTRAL
from megatron_ext.hf.raw import integer, switch
from megatron_ext.rotary import find_scheme
from megatron_ext.vision import VisionConfig
from megatron_ext.vision.connectors import ACTIVATIONS
from megatron_ext.vision.kinds import merged_width, read_tower_config
from megatron_ext.vision.tiling import sizes_of

__all__ = ["MULTIMODAL", "SCHEME", "family_of", "family_scheme", "make_multimodal", "read_vision"]

MULTIMODAL = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
# Of Qwen's: the family of its language model, and the sections of a file that says none.
LANGUAGE = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}
SECTIONS = {"qwen2_vl": [16, 24, 24], "qwen2_5_vl": [16, 24, 24], "qwen3_vl": [24, 20, 20]}
# Of LLaVA's: its connector and whether every image is cut; and what transformers assumes for a missing key: the types of tower
# and language model, which layers, tokens.
CONNECTOR = {"llava": ("mlp", False), "llava_next": ("onevision", True), "llava_onevision": ("onevision", False)}
LLAVA = {
    "llava": {
        "vision_config": {"model_type": "clip_vision_model"}, "text_config": {"model_type": "llama"}, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "image_token_index": 32000,
    },
    "llava_next": {
        "vision_config": {"model_type": "clip_vision_model"}, "text_config": {"model_type": "llama"}, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "image_token_index": 32000,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], "vision_aspect_ratio": "anyres",
    },
    "llava_onevision": {
        "vision_config": {"model_type": "siglip_vision_model"}, "text_config": {"model_type": "qwen2"},
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": 151646,
        "video_token_index": 151647, "image_grid_pinpoints": sizes_of(384), "vision_aspect_ratio": "anyres_max_9",
    },
}  # fmt: skip
TILES = {"image_grid_pinpoints", "vision_aspect_ratio"}
OWN_KEYS = {
    "llava": {
        "image_token_index", "image_token_id", "image_seq_length", "projector_hidden_act", "vision_feature_select_strategy",
        "vision_feature_layer", "multimodal_projector_bias", "ignore_index", "vocab_size",
    },
    "qwen2_vl": {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id"},
}  # fmt: skip
OWN_KEYS["llava_next"] = OWN_KEYS["llava"] | {"use_image_newline_parameter", "image_grid_pinpoints"}
OWN_KEYS["llava_onevision"] = OWN_KEYS["llava_next"] | {"video_token_index", "video_token_id", "vision_aspect_ratio"}
OWN_KEYS["qwen2_5_vl"] = OWN_KEYS["qwen3_vl"] = OWN_KEYS["qwen2_vl"]
# Ours: how media are placed, where that is not the family's way.
SCHEME = "position_scheme"
PARTS = {"text_config", "vision_config", "tie_word_embeddings", SCHEME}


def family_of(vision: VisionConfig) -> str:
    """The model_type of transformers with such eyes.

    Raises:
        UserError: there is none.
    """
    for family, seen in CONNECTOR.items():
        if vision.has_tower and (vision.connector, vision.cuts_all) == seen:
            return family
    if vision.has_tower and vision.connector == "merger":
        return vision.tower_config["model_type"].removesuffix("_vision")
    raise UserError(
        "transformers has no such model: one that sees needs model.vision.tower and model.vision.connector=mlp; checkpoints of "
        "ours hold it all the same"
    )


def read_vision(raw: dict[str, Any], folder: Path, where: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(the config.json of the language model alone, fields of `VisionConfig` in plain data, the position scheme of media) of a
    model that sees.

    Raises:
        UserError: anything in it that our model does not compute.
    """
    kind = raw["model_type"]
    _refuse(raw, kind, where)
    text, given = (_read_llava if kind in LLAVA else _read_qwen)(raw, where)
    tied = any(
        source.get("tie_word_embeddings") and switch(source, "tie_word_embeddings", where) for source in (raw, text)
    )
    given |= read_preprocessing(folder)
    try:
        vision = VisionConfig(**given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if (family := family_of(vision)) != kind:
        raise UserError(
            f"{where}: vision_aspect_ratio={vision.vision_aspect_ratio} is that of model_type={family}, and model_type={kind}; "
            "fetch the file again"
        )
    scheme = raw.get(SCHEME, family_scheme(vision))
    try:
        find_scheme(scheme)
    except UserError as error:
        raise UserError(f"{where}: {SCHEME}: {error}") from error
    return text | {"tie_word_embeddings": tied}, dataclasses.asdict(vision), scheme


def family_scheme(vision: VisionConfig) -> str:
    """How transformers places media."""
    if not vision.kind.merges:
        return "rope"
    name = family_of(vision)
    ticks = vision.tower_config.get("tokens_per_second")
    return name if ticks is None else f"{name}(tokens_per_second={ticks})"


def _refuse(raw: dict[str, Any], kind: str, where: str) -> None:
    architectures = raw.get("architectures") or [MULTIMODAL[kind]]
    if architectures != [MULTIMODAL[kind]]:
        raise UserError(
            f"{where}: architectures={architectures} is no model of model_type={kind} that is read here, which is "
            f"{MULTIMODAL[kind]}; choose a folder with such a model"
        )
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantised weights (quantization_config) are not read; take the model without them")
    if kind not in LLAVA and "text_config" not in raw:  # of 2024: all keys are the language model's
        return
    known = PARTS | OWN_KEYS[kind] | NEUTRAL | EVERYWHERE
    for key, value in raw.items():
        if key not in known and not key.startswith("_") and value not in (None, False, [], {}):
            raise UserError(
                f"{where}: {key}={str(value)[:80]} is not known of {kind}; if the model computes the same without it, take it "
                "out of the file"
            )


def _object(raw: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    if not isinstance(raw.get(key), dict):
        raise UserError(f"{where}: {key} must be an object, got {str(raw.get(key))[:80]}; fetch the file again")
    return raw[key]


def _read_llava(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    kind = raw["model_type"]
    assumed = LLAVA[kind]
    text, tower = (assumed[key] | _object(raw, key, where) for key in ("text_config", "vision_config"))
    tokens = {}
    for name, older in (("image_token_id", "image_token_index"), ("video_token_id", "video_token_index")):
        if older in assumed:
            tokens[name] = integer(assumed | raw, name if name in raw else older, where, least=0)
    if not switch({"use_image_newline_parameter": True} | raw, "use_image_newline_parameter", where):
        raise UserError(f"{where}: use_image_newline_parameter=false is not read here, only true; choose another model")
    given = assumed | {key: raw[key] for key in TILES & raw.keys() if raw[key] is not None}
    activation = raw.get("projector_hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}: projector_hidden_act={activation!r} is not read here, only {', '.join(ACTIVATIONS)}")
    return text, {
        "tower_config": read_tower_config(tower, f"{where}: vision_config"),
        "vision_feature_layer": (assumed | raw)["vision_feature_layer"],
        "vision_feature_select_strategy": (assumed | raw)["vision_feature_select_strategy"],
        "connector": CONNECTOR[kind][0],
        "connector_bias": switch({"multimodal_projector_bias": True} | raw, "multimodal_projector_bias", where),
        "connector_activation": activation,
        **tokens,
        **{key: given[key] for key in TILES & assumed.keys()},
    }


def _read_qwen(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from transformers import AutoConfig

    kind = raw["model_type"]
    aside = PARTS | OWN_KEYS[kind] | {"model_type", "architectures"}
    within = _object(raw, "text_config", where) if "text_config" in raw else raw
    given = {
        key: value for key, value in within.items() if key not in aside and key not in ("rope_scaling", "rope_theta")
    }
    tower = {**_object(raw, "vision_config", where), "model_type": f"{kind}_vision"}
    tower.pop("in_chans", None)  # a name of 2024, beside which in_channels stands
    try:
        whole = AutoConfig.for_model(kind, **{k: v for k, v in raw.items() if k != "model_type"}).text_config.to_dict()
    except Exception as error:  # of any kind that transformers' own checks raise
        raise UserError(
            f"{where}: transformers cannot read this {kind}: {str(error)[:200]}; fetch the file again"
        ) from error
    rope = {key: value for key, value in whole["rope_parameters"].items() if key != "type"}
    rope.setdefault("mrope_section", SECTIONS[kind])
    keys = {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_sliding_window", "sliding_window",
        "max_window_layers", "layer_types", "attention_dropout", "head_dim", "attention_bias",
    }  # fmt: skip
    text = (
        given
        | {key: whole[key] for key in keys & whole.keys()}
        | {"model_type": LANGUAGE[kind], "rope_parameters": rope}
    )
    if "tie_word_embeddings" in within:
        text["tie_word_embeddings"] = within["tie_word_embeddings"]
    config = read_tower_config(tower, f"{where}: vision_config")
    if merged_width(config) != text["hidden_size"]:
        raise UserError(
            f"{where}: the tower gives {merged_width(config)} numbers for each token, the language model takes "
            f"{text['hidden_size']} (hidden_size); fetch the file again"
        )
    return text, {
        "tower_config": config,
        "image_token_id": integer({"image_token_id": 151655} | raw, "image_token_id", where, least=0),
        "video_token_id": integer({"video_token_id": 151656} | raw, "video_token_id", where, least=0),
    }


def make_multimodal(vision: VisionConfig, text: dict[str, Any], sections: list[int]) -> dict[str, Any]:
    """A config.json for a model with such eyes, around that of its language model.

    Args:
        sections: pairs that time, rows and columns turn; of no meaning for LLaVA.

    Raises:
        UserError: no family has such a model.
    """
    kind, config = family_of(vision), vision.tower_config
    if vision.image_token_id is None:
        raise UserError(
            "transformers must know which token stands for an image's: set model.vision.image_token_id to the id of "
            "data.video.placeholder"
        )
    made = {
        "architectures": [MULTIMODAL[kind]],
        "model_type": kind,
        "text_config": text,
        "vision_config": config,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    video = vision.image_token_id if vision.video_token_id is None else vision.video_token_id
    if kind in LLAVA:
        length = {"image_seq_length": (config["image_size"] // config["patch_size"]) ** 2}
        sizes = {"image_grid_pinpoints": vision.image_grid_pinpoints}
        own = {
            "llava": length,
            "llava_next": length | sizes,
            "llava_onevision": sizes | {"vision_aspect_ratio": vision.vision_aspect_ratio, "video_token_index": video},
        }[kind]
        return (
            made
            | own
            | {
                "image_token_index": vision.image_token_id,
                "vision_feature_layer": vision.vision_feature_layer,
                "vision_feature_select_strategy": vision.vision_feature_select_strategy,
                "multimodal_projector_bias": vision.connector_bias,
                "projector_hidden_act": vision.connector_activation,
            }
        )
    rope = text["rope_parameters"] | {"mrope_section": sections}
    made["text_config"] = text | {"model_type": f"{kind}_text", "rope_parameters": rope, "architectures": None}
    return made | {"image_token_id": vision.image_token_id, "video_token_id": video}
