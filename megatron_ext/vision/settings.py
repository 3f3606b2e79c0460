"""What the configuration says of a model's eyes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.kinds import Speed, Start, Training
from megatron_ext.vision.kinds import TOWERS, TowerKind, deepstack_depth, read_tower_config
from megatron_ext.vision.tiling import most_tiles, sizes_of

__all__ = ["CONNECTORS", "STRATEGIES", "VisionConfig"]

CONNECTORS = ("norm_mlp", "mlp", "onevision", "merger")
STRATEGIES = ("default", "full")
ACTIVATION_NAMES = ("gelu", "relu", "silu")


@dataclass
class VisionConfig:
    """What stands for a token of an image or video."""

    # Numbers per media token: pixels of its patch (times channels and frames), or what another encoder computed; null: what the
    # tower computes.
    feature_size: int | None = None
    # Folder of a vision model of transformers (SigLIP, SigLIP 2 of fixed size, CLIP), or of a model that has one, from which a
    # new run takes the tower's weights and the next two keys; null: rows bring features, or a token is the pixels of its patch.
    tower: Start[str | None] = None
    # The tower's shape, as in its config.json; null: read from the folder.
    tower_config: dict[str, Any] | None = None
    # How pictures are resized and normalised, as in a preprocessor_config.json; null: read from the folder.
    preprocessing: Training[dict[str, Any] | None] = None
    # The same of a video's frames, as in a video_preprocessor_config.json, without which frames they are; null: read from the
    # folder, and as of images where it says nothing.
    video_preprocessing: Training[dict[str, Any] | None] = None
    # Which of the tower's hidden states are the features, counted as transformers does: 0 are its embeddings, -1 the last
    # layer's; of several each token has all, one behind the other. Without meaning for Qwen's towers.
    vision_feature_layer: int | list[int] = -2
    # "default" leaves out a tower's first token, which CLIP's has and SigLIP's has not; "full" takes all. null: as the tower
    # needs it. Without meaning for Qwen's towers.
    vision_feature_select_strategy: str | None = None
    # What brings features into the model's width: "norm_mlp" (norm, linear, GELU, linear), "mlp" (LLaVA's, without the norm),
    # "onevision" (the same, a video's frames halved, and a learnt token behind every medium), "merger" (Qwen's, part of its
    # tower); null: as the tower has it, norm_mlp without one.
    connector: str | None = None
    # With "onevision", sizes in pixels, height and width, into tiles of which images are cut, as transformers has them: multiples
    # of the tower's side; null: up to six by six.
    image_grid_pinpoints: list[list[int]] | None = None
    # The same: "anyres_max_N" cuts an image that is alone in its row (LLaVA-OneVision), where N is how many tiles' features may
    # stand for it; more are interpolated. "anyres" cuts every image, and shows no video (LLaVA-1.6).
    vision_aspect_ratio: str = "anyres_max_9"
    # Biases of the connectors "mlp" and "onevision", transformers' multimodal_projector_bias.
    connector_bias: bool = True
    # What its two linears have between them, transformers' projector_hidden_act.
    connector_activation: str = "gelu"
    # The family's token that stands for a token of an image, which an export tells transformers; null: it cannot be exported.
    image_token_id: int | None = None
    # Of a video; null: as of an image.
    video_token_id: int | None = None
    # GiB of host memory for what a frozen tower has computed, in each process.
    cache_gib: Speed[float] = 4.0
    # Folder in which that is kept for later runs and for all processes of a machine; null: nowhere. It belongs to one tower.
    cache_folder: Speed[str | None] = None
    # GiB that the folder may grow to; nothing more is put into it then.
    cache_folder_gib: Speed[float] = 64.0

    def __post_init__(self):
        for name in ("tower_config", "preprocessing", "video_preprocessing"):
            setattr(self, name, copy.deepcopy(getattr(self, name)))
        if not isinstance(self.vision_feature_layer, int):
            self.vision_feature_layer = list(self.vision_feature_layer)
        if self.image_grid_pinpoints is not None:
            sizes = self.image_grid_pinpoints
            sizes = sizes if isinstance(sizes, Sequence) else [sizes]
            self.image_grid_pinpoints = [list(size) if isinstance(size, Sequence) else size for size in sizes]
        if self.tower_config is None:
            if self.feature_size is None and self.tower is None:
                raise UserError(
                    "model.vision.feature_size is missing: set it, or name a vision model in model.vision.tower"
                )
            self.connector = self.connector or "norm_mlp"
        else:
            self._complete()
        for broken, message in self._rules():
            if broken:
                raise UserError(message)

    def _complete(self) -> None:
        name = self.tower_config.get("model_type")
        if name not in TOWERS or not self.tower_config.keys() >= set(TOWERS[name].keys):  # written by hand
            self.tower_config = read_tower_config(self.tower_config, "model.vision.tower_config")
        kind = self.kind
        if self.vision_feature_select_strategy is None:
            self.vision_feature_select_strategy = "default" if kind.class_token else "full"
        self.connector = self.connector or ("merger" if kind.merges else "mlp")
        width = kind.width(self.tower_config) * (1 if kind.merges else len(self.layers))
        if self.feature_size not in (None, width) and width:
            raise UserError(
                f"model.vision.feature_size={self.feature_size}, but the tower computes {width} numbers for each token: leave "
                "feature_size out"
            )
        self.feature_size = width
        if self.condenses and self.image_grid_pinpoints is None:
            self.image_grid_pinpoints = sizes_of(self.tower_config["image_size"])

    def _rules(self) -> Iterator[tuple[bool, str]]:
        if self.has_tower and not self.kind.merges:
            count = self.tower_config["num_hidden_layers"]
            yield (
                not self.layers or any(not -count - 1 <= layer <= count for layer in self.layers),
                f"model.vision.vision_feature_layer={self.vision_feature_layer}: the tower has hidden states {-count - 1} to "
                f"{count}",
            )
        if self.feature_size is not None:
            yield self.feature_size < 1, f"model.vision.feature_size={self.feature_size} must be at least 1"
        for name, known in (("connector", CONNECTORS), ("vision_feature_select_strategy", STRATEGIES)):
            value = getattr(self, name)
            yield value not in (None, *known), f"model.vision.{name} must be one of {', '.join(known)}, got {value!r}"
        yield (
            self.connector_activation not in ACTIVATION_NAMES,
            f"model.vision.connector_activation must be one of {', '.join(ACTIVATION_NAMES)}, got {self.connector_activation!r}",
        )
        for name in ("cache_gib", "cache_folder_gib"):
            yield getattr(self, name) < 0, f"model.vision.{name}={getattr(self, name)} must be at least 0"
        if self.tower_config is None:
            yield self.connector == "merger", "model.vision.connector=merger is part of Qwen's towers: choose mlp"
            yield (
                self.condenses,
                "model.vision.connector=onevision brings a tower's frames into fewer tokens, and there is none: name one in "
                "model.vision.tower, or choose mlp",
            )
            return
        kind = self.kind
        yield (
            (self.connector == "merger") != kind.merges,
            f"model.vision.connector={self.connector} does not fit a tower of {self.tower_config['model_type']}: leave it out",
        )
        yield (
            not kind.merges and (self.vision_feature_select_strategy == "default") != kind.class_token,
            f"model.vision.vision_feature_select_strategy={self.vision_feature_select_strategy} does not give one token for each "
            f"patch of {self.tower_config['model_type']}, which has {'a' if kind.class_token else 'no'} class token: leave it "
            "out",
        )
        if not self.condenses:
            return
        side, sizes = self.tower_config["image_size"], self.image_grid_pinpoints
        wrong = [
            size
            for size in sizes
            if not isinstance(size, list)
            or len(size) != 2
            or any(type(s) is not int or s < side or s % side for s in size)
        ]
        yield (
            not sizes or bool(wrong),
            f"model.vision.image_grid_pinpoints={str(wrong[:1] or sizes)}: sizes that images are cut into tiles of are multiples "
            f"of the tower's {side} pixels, height and width",
        )
        yield (
            most_tiles(self.vision_aspect_ratio) is None,
            f"model.vision.vision_aspect_ratio={self.vision_aspect_ratio} is neither anyres nor of the form anyres_max_9: take "
            "the one of the model's config.json",
        )

    @property
    def kind(self) -> TowerKind:
        return TOWERS[self.tower_config["model_type"]]

    @property
    def has_tower(self) -> bool:
        return self.tower_config is not None

    @property
    def keeps(self) -> bool:
        """Whether what a frozen tower has computed is kept."""
        return bool(self.cache_gib) or self.cache_folder is not None

    @property
    def condenses(self) -> bool:
        """Whether the connector leaves half of the rows and columns of a video's frames and puts a token of its own behind every
        image and video, so that it must be told which features are of which."""
        return self.connector == "onevision"

    @property
    def cuts_all(self) -> bool:
        """Whether every image is seen in tiles, and no video; else an image that is alone in its row, if any."""
        return self.condenses and most_tiles(self.vision_aspect_ratio) == math.inf

    @property
    def deepstack(self) -> int:
        """How many of the decoder's first layers are fed from within the tower."""
        return deepstack_depth(self.tower_config) if self.has_tower else 0

    @property
    def layers(self) -> list[int]:
        found = self.vision_feature_layer
        return [found] if isinstance(found, int) else found
