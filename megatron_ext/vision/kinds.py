"""The vision models of transformers that can be towers: what of their configuration counts, and how they map pixels to features.

Shape legend: T frames, S side of a square frame in pixels, n media tokens, f features of one, p patches, e width of a patch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.vision.pixels import Pixels

__all__ = [
    "TOWERS",
    "EncoderSizes",
    "TowerKind",
    "Unmerged",
    "build_mergers",
    "build_tower",
    "deepstack_depth",
    "merged_width",
    "read_tower_config",
]

ENCODER = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip
# Of no bearing on features, or keys of 2022 and 2023 that no tower has ever read.
IDLE = {
    "_attn_implementation", "_name_or_path", "architectures", "dtype", "initializer_factor", "initializer_range", "model_type",
    "projection_dim", "torch_dtype", "transformers_version", "id2label", "label2id", "tie_word_embeddings", "use_bfloat16",
    "vocab_size",
}  # fmt: skip
DROPOUTS = {"attention_dropout", "dropout"}


@dataclass(frozen=True)
class EncoderSizes:
    """
    Attributes:
        width: of a patch. inside: of a layer's MLP, of which the backward pass keeps `linears` times as much.
        products: of a layer's MLP, each of width x inside.
        depth: layers.
        rows: of the encoder for each token: the patches that it shows, and its share of a class token.
        pixels: numbers of a patch.
    """

    width: int
    inside: int
    depth: int
    rows: float
    linears: int
    products: int
    pixels: int


@dataclass(frozen=True)
class TowerKind:
    """One model_type of transformers.

    Attributes:
        keys: of its config.json that count.
        width: numbers of a token's features, by the configuration; of one layer, where several may be chosen.
        features: (model, media, layers, leave the first token out) -> for each medium [n, f].
        class_token: whether a token stands before the patches.
        merges: whether it is Qwen's, which ends with a merger of several patches into a token; that is the connector.
        apart: whether its family writes a video as frames with text between.
    """

    keys: tuple[str, ...]
    width: Callable[[dict[str, Any]], int]
    features: Callable[[torch.nn.Module, Sequence[Pixels], Sequence[int], bool], list[Tensor]]
    class_token: bool = False
    merges: bool = False
    apart: bool = False

    def grid(self, config: dict[str, Any], patches: tuple[int, int, int]) -> tuple[int, int, int]:
        """(t, h, w) in tokens of a medium of so many patches."""
        t, h, w = patches
        merge = config["spatial_merge_size"] if self.merges else 1
        return t, h // merge, w // merge

    def sizes(self, config: dict[str, Any]) -> EncoderSizes:
        width = config["embed_dim"] if "embed_dim" in config else config["hidden_size"]
        inside = config["intermediate_size"] if "intermediate_size" in config else width * config["mlp_ratio"]
        depth = config["depth" if self.merges else "num_hidden_layers"]
        gated = config["model_type"] == "qwen2_5_vl_vision"
        pixels = 3 * config["patch_size"] ** 2 * (config["temporal_patch_size"] if self.merges else 1)
        rows = config["spatial_merge_size"] ** 2 if self.merges else 1.0
        if self.class_token:
            rows += (config["patch_size"] / config["image_size"]) ** 2
        return EncoderSizes(width, inside, depth, rows, 4 if gated else 2, 3 if gated else 2, pixels)

    def seen(self, config: dict[str, Any], frame: int) -> list[int]:
        """Rows that a row sees in each layer: those of its frame, or of its window within it.

        Args:
            frame: patches of a frame, where it may have any size.
        """
        if not self.merges:
            rows = (config["image_size"] // config["patch_size"]) ** 2 + self.class_token
            return [rows] * config["num_hidden_layers"]
        window = (config["window_size"] // config["patch_size"]) ** 2 if "window_size" in config else frame
        whole = {*config.get("fullatt_block_indexes", ())}
        return [frame if layer in whole else min(window, frame) for layer in range(config["depth"])]

    def used(self, name: str, config: dict[str, Any], layers: Sequence[int]) -> bool:
        """Whether features depend on a parameter."""
        if self.merges:
            return True
        top = max(layer % (config["num_hidden_layers"] + 1) for layer in layers)
        number = name.split(".layers.")[1].split(".")[0] if ".layers." in name else ""
        if number:
            return int(number) < top
        return not name.startswith(("post_layernorm.", "head.")) and (top > 0 or not name.startswith("encoder."))


def _device(model: torch.nn.Module) -> dict[str, Any]:
    weight = next(model.parameters())
    return {"device": weight.device, "dtype": weight.dtype}


def _of_frames(
    model: torch.nn.Module, media: Sequence[Pixels], layers: Sequence[int], without_first: bool
) -> list[Tensor]:
    """Of towers that see frames of one size, one by one."""
    frames = torch.cat([medium.values for medium in media]).to(**_device(model))  # [T, 3, S, S]
    states = model(pixel_values=frames, output_hidden_states=True).hidden_states
    chosen = torch.cat([states[layer][:, int(without_first) :] for layer in layers], -1)  # [T, tokens of a frame, f]
    return [part.flatten(0, 1) for part in chosen.split([len(medium.values) for medium in media])]


def _of_patches(
    model: torch.nn.Module, media: Sequence[Pixels], layers: Sequence[int], without_first: bool
) -> list[Tensor]:
    """Of Qwen's towers, of media of any size; what would be merged stands one behind the other, in the merger's order."""
    place = _device(model)
    patches = torch.cat([medium.values for medium in media]).to(**place)  # [p, numbers of a patch]
    grids = torch.tensor([medium.patches for medium in media], device=place["device"])
    out = model(patches, grid_thw=grids)
    found = torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], -1)  # [n, f]
    merged = model.spatial_merge_size**2
    return list(found.split([math.prod(medium.patches) // merged for medium in media]))


def _qwen_width(config: dict[str, Any]) -> int:
    """Of all patches that a token shows, behind the last layer, and behind each that deepstack takes features from."""
    return (1 + deepstack_depth(config)) * _patch_width(config) * config["spatial_merge_size"] ** 2


def _patch_width(config: dict[str, Any]) -> int:
    return config["embed_dim" if config["model_type"] == "qwen2_vl_vision" else "hidden_size"]


def deepstack_depth(config: dict[str, Any]) -> int:
    """How many of the decoder's first layers are fed from within the tower (DeepStack, arXiv 2406.04334)."""
    return len(config.get("deepstack_visual_indexes", ()))


class Unmerged(torch.nn.Module):
    """In a merger's place: the patches of a token one behind the other, [p, e] -> [n, f]."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, patches: Tensor) -> Tensor:
        return patches.reshape(-1, self.count * patches.shape[-1])


CLIP = TowerKind(ENCODER, lambda config: config["hidden_size"], _of_frames, class_token=True)
SIGLIP = TowerKind((*ENCODER, "vision_use_head"), lambda config: config["hidden_size"], _of_frames)
QWEN = (
    "depth", "hidden_size", "hidden_act", "num_heads", "in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size",
    "rope_parameters",
)  # fmt: skip
QWEN_CLASSES = {
    "qwen2_vl_vision": ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "PatchMerger"),
    "qwen2_5_vl_vision": ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLPatchMerger"),
    "qwen3_vl_vision": ("qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionPatchMerger"),
}
TOWERS = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    "qwen2_vl_vision": TowerKind((*QWEN, "embed_dim", "mlp_ratio"), _qwen_width, _of_patches, merges=True),
    "qwen2_5_vl_vision": TowerKind(
        (*QWEN, "intermediate_size", "out_hidden_size", "window_size", "fullatt_block_indexes", "tokens_per_second"),
        _qwen_width,
        _of_patches,
        merges=True,
    ),
    "qwen3_vl_vision": TowerKind(
        (*QWEN, "intermediate_size", "out_hidden_size", "num_position_embeddings", "deepstack_visual_indexes"),
        _qwen_width,
        _of_patches,
        merges=True,
        apart=True,
    ),
}


def read_tower_config(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """What counts of a tower's configuration, with what it leaves out as transformers' class assumes it.

    Args:
        raw: of a config.json, or its vision_config.

    Raises:
        UserError: another model than these, or one with a key that changes what it computes and is not known here.
    """
    from transformers import AutoConfig

    kind = TOWERS.get(str(raw.get("model_type")))
    if kind is None:
        raise UserError(
            f"{where}: a tower of model_type={raw.get('model_type')!r} is not read here, only {', '.join(TOWERS)}; choose another"
        )
    name, given = raw["model_type"], {key: value for key, value in raw.items() if key != "model_type"}
    try:
        whole = AutoConfig.for_model(name, **given).to_dict()
        whole = {key: list(value) if isinstance(value, tuple) else value for key, value in whole.items()}
        found = {"model_type": name} | {key: whole[key] for key in kind.keys}
        plain = AutoConfig.for_model(**found).to_dict()
    except Exception as error:  # of any kind that transformers' own checks raise
        raise UserError(
            f"{where}: transformers cannot read this {name}: {str(error)[:200]}; fetch the file again"
        ) from error
    for key in sorted(whole.keys() - IDLE - DROPOUTS):
        if whole[key] != plain.get(key):
            raise UserError(f"{where}: {key}={str(whole[key])[:80]} is not known of {name}; choose another tower")
    for key in sorted(whole.keys() & DROPOUTS):
        if whole[key]:
            raise UserError(
                f"{where}: {key}={whole[key]}: what is dropped would differ from one pass over a clip to the next; set it to 0"
            )
    # What is left at the edge of a picture belongs to no patch: 384 pixels are 27 patches of 14.
    if not kind.merges and (type(found["image_size"]) is not int or found["image_size"] < found["patch_size"]):
        raise UserError(
            f"{where}: image_size={found['image_size']} holds no patch of patch_size={found['patch_size']}; fetch the file again"
        )
    within = found.get("deepstack_visual_indexes", [])
    if within != sorted({*within} & {*range(found.get("depth", 0))}):
        raise UserError(
            f"{where}: deepstack_visual_indexes={within} must be numbers of the tower's {found['depth']} layers, ascending; "
            "fetch the file again"
        )
    return found


def build_tower(config: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """transformers' module with fresh weights; on "meta" it takes no memory."""
    from transformers import AutoConfig, AutoModel

    made = AutoConfig.for_model(**config)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        if not TOWERS[config["model_type"]].merges:
            return AutoModel.from_config(made, attn_implementation="sdpa")
        model = _qwen_class(config, "tower")._from_config(made, attn_implementation="sdpa")
    merged = config["spatial_merge_size"] ** 2
    model.merger = Unmerged(merged)
    if depth := deepstack_depth(config):
        model.deepstack_merger_list = torch.nn.ModuleList(Unmerged(merged) for _ in range(depth))
    return model


def build_mergers(config: dict[str, Any], device: torch.device) -> list[torch.nn.Module]:
    """transformers' own of a tower of Qwen: the one at its end, [p, e] -> [n, h], and those of deepstack, [n, f] -> [n, h]."""
    from transformers import AutoConfig

    made = _qwen_class(config, "merger")
    with torch.device("meta" if device.type == "meta" else "cpu"):
        if config["model_type"] != "qwen3_vl_vision":
            return [made(merged_width(config), _patch_width(config), config["spatial_merge_size"])]
        whole = AutoConfig.for_model(**config)
        within = (made(whole, use_postshuffle_norm=True) for _ in range(deepstack_depth(config)))
        return [made(whole, use_postshuffle_norm=False), *within]


def merged_width(config: dict[str, Any]) -> int:
    """Numbers of a token behind the merger, which the language model must take."""
    return config["hidden_size" if config["model_type"] == "qwen2_vl_vision" else "out_hidden_size"]


def _qwen_class(config: dict[str, Any], part: str) -> type[torch.nn.Module]:
    family, *classes = QWEN_CLASSES[config["model_type"]]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, classes[("tower", "merger").index(part)])
