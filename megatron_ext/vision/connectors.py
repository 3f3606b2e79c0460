"""Features of media tokens into the model's hidden space. Small, and the same on every tensor-parallel rank.

Shape legend: n media tokens, f features of one, h hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.vision.kinds import build_mergers
from megatron_ext.vision.pixels import Pixels
from megatron_ext.vision.settings import VisionConfig
from megatron_ext.vision.tiling import Tiling

__all__ = ["ACTIVATIONS", "LlavaProjector", "MediaProjector", "OnevisionProjector", "QwenMerger", "build_connector"]

# By transformers' names.
ACTIVATIONS = {"gelu": torch.nn.GELU, "relu": torch.nn.ReLU, "silu": torch.nn.SiLU}


class MediaProjector(torch.nn.Module):
    """Patch embedding, GELU, projection.

    The first linear layer on the pixels of a patch is a convolution with the patch's size as stride; features that
    another encoder precomputed enter the same way.
    """

    def __init__(self, feature_size: int, hidden_size: int, init_std: float):
        super().__init__()
        self.norm = torch.nn.LayerNorm(feature_size)
        self.patch = torch.nn.Linear(feature_size, hidden_size)
        self.out = torch.nn.Linear(hidden_size, hidden_size)
        for layer in (self.patch, self.out):
            torch.nn.init.normal_(layer.weight, std=init_std)
            torch.nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[n, f] -> [n, h]."""
        features = features.to(self.patch.weight.dtype)
        return self.out(torch.nn.functional.gelu(self.patch(self.norm(features))))


class LlavaProjector(torch.nn.Module):
    """LLaVA's two linears (arXiv 2310.03744), in transformers' names."""

    def __init__(self, feature_size: int, hidden_size: int, init_std: float, bias: bool, activation: str):
        super().__init__()
        self.linear_1 = torch.nn.Linear(feature_size, hidden_size, bias=bias)
        self.act = ACTIVATIONS[activation]()
        self.linear_2 = torch.nn.Linear(hidden_size, hidden_size, bias=bias)
        for layer in (self.linear_1, self.linear_2):
            torch.nn.init.normal_(layer.weight, std=init_std)
            if bias:
                torch.nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[n, f] -> [n, h]."""
        return self.linear_2(self.act(self.linear_1(features.to(self.linear_1.weight.dtype))))


class OnevisionProjector(LlavaProjector):
    """LLaVA-OneVision's (arXiv 2408.03326): of a video's frames half the rows and columns are left, by bilinear interpolation,
    and behind every image and every video stands a learnt token; of an image that is cut into tiles behind every row of them."""

    def __init__(self, feature_size: int, hidden_size: int, init_std: float, bias: bool, activation: str):
        super().__init__(feature_size, hidden_size, init_std, bias, activation)
        self.image_newline = torch.nn.Parameter(torch.randn(hidden_size) * init_std)

    def forward(self, features: Tensor, media: Sequence[Pixels]) -> Tensor:
        """[patches of all media, f] -> [n, h]."""
        projected = super().forward(features).split([math.prod(medium.patches) for medium in media])
        parts = []
        for medium, part in zip(media, projected, strict=True):
            if medium.tiling is not None:
                parts.append(self._of_tiles(part, medium.patches, medium.tiling))
                continue
            if medium.video:
                t, h, w = medium.patches
                part = _resized(part.unflatten(0, (t, h, w)), -(-h // 2), -(-w // 2)).flatten(0, 2)
            parts += [part, self.image_newline.unsqueeze(0)]
        return torch.cat(parts)

    def _of_tiles(self, features: Tensor, patches: tuple[int, int, int], tiling: Tiling) -> Tensor:
        """[t h w, h] of the whole and the tiles -> [n, h]: the whole, and the rows of the tiles put together."""
        _, h, w = patches
        whole, tiles = features[: h * w], features[h * w :]
        grid = tiles.unflatten(0, (tiling.rows, tiling.columns, h, w)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        between = grid[tiling.top :, tiling.left :][: tiling.height, : tiling.width]
        if tiling.kept != (tiling.height, tiling.width):
            between = _resized(between.unsqueeze(0), *tiling.kept)[0]
        ends = self.image_newline.expand(len(between), 1, -1)
        return torch.cat([whole, torch.cat([between, ends], 1).flatten(0, 1)])


def _resized(grid: Tensor, height: int, width: int) -> Tensor:
    """[t, rows, columns, h] -> [t, height, width, h], bilinear. As products with the weights of `interpolate`, whose gradient on
    a GPU is not the same from one run to the next; in fp32, as it computes, and rounded once."""
    exact = grid.to(torch.promote_types(grid.dtype, torch.float32))
    rows, columns = _weights(grid.shape[1], height).to(exact), _weights(grid.shape[2], width).to(exact)
    return torch.einsum("thwc,hy,wx->tyxc", exact, rows, columns).to(grid.dtype)


def _weights(side: int, kept: int) -> Tensor:
    """fp64 [side, kept]: how much of each row a row of `kept` has."""
    each = torch.eye(side, dtype=torch.float64).unsqueeze(0)
    return torch.nn.functional.interpolate(each, size=kept, mode="linear")[0]


class QwenMerger(torch.nn.Module):
    """The merger that Qwen's towers end with, in transformers' names: the patches of a token become one. Of a tower with
    deepstack also those behind d earlier layers of it; what they make stands behind."""

    def __init__(self, tower: dict[str, Any], device: torch.device):
        super().__init__()
        self.merger, *within = build_mergers(tower, device)
        if within:
            self.deepstack_merger_list = torch.nn.ModuleList(within)
        self.merged, self.depth = tower["spatial_merge_size"] ** 2, len(within)

    def forward(self, features: Tensor) -> Tensor:
        """[n, f] -> [n, (1 + d) h]."""
        last, *within = features.to(next(self.parameters()).dtype).chunk(1 + self.depth, -1)
        found = self.merger(last.reshape(-1, last.shape[-1] // self.merged))
        if not within:
            return found
        return torch.cat([found, *(m(x) for m, x in zip(self.deepstack_merger_list, within, strict=True))], -1)


def build_connector(vision: VisionConfig, hidden_size: int, init_std: float) -> torch.nn.Module:
    if vision.connector == "norm_mlp":
        return MediaProjector(vision.feature_size, hidden_size, init_std)
    if vision.connector == "merger":
        return QwenMerger(vision.tower_config, torch.empty(0).device)
    made = OnevisionProjector if vision.condenses else LlavaProjector
    return made(vision.feature_size, hidden_size, init_std, vision.connector_bias, vision.connector_activation)
