"""A vision model of transformers as part of the first pipeline stage, the same on every tensor-parallel rank.

Frozen, it sees a clip once: what it computed is kept by content, and the ranks that share a stream share the work. Where it
trains it runs with every stream, on all media of the stream at once.

Shape legend: n media tokens, f features of one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.runtime.collectives import broadcast
from megatron_ext.vision.cache import FeatureCache, FeatureFolder
from megatron_ext.vision.kinds import build_tower
from megatron_ext.vision.pixels import Pixels
from megatron_ext.vision.settings import VisionConfig

__all__ = ["VisionTower"]

logger = logging.getLogger(__name__)


class VisionTower(torch.nn.Module):
    """
    Args:
        vision: with a tower's configuration.
        group: ranks that see the same streams: tensor- and context-parallel ones.
        recompute: its layers are computed again in the backward pass instead of kept.

    Attributes:
        model: transformers' module.
        seen: media that it has been run on, on this rank.
    """

    def __init__(self, vision: VisionConfig, group: dist.ProcessGroup, device: torch.device, recompute: bool = False):
        super().__init__()
        self.vision, self.group = vision, group
        self.model = build_tower(vision.tower_config, device)
        if recompute:
            self.model.activation_checkpointing_enable()
        self.seen = 0
        self.forget()

    def forget(self) -> None:
        """What is kept: for weights that have changed."""
        self._kept = FeatureCache(int(self.vision.cache_gib * 2**30))
        self._folder: FeatureFolder | None = None

    def to_precision(self, dtype: torch.dtype) -> None:
        """Its parameters; tables that it computes with, such as frequencies, stay as they are."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    @property
    def trains(self) -> bool:
        return any(p.requires_grad for p in self.parameters())

    def forward(self, media: Sequence[Pixels]) -> Tensor:
        """Features of all tokens of all media, in order: [n, f]."""
        if self.trains:
            once = list({m.key: m for m in media}.values())
            found = dict(zip((m.key for m in once), self._see(once), strict=True))
            return torch.cat([found[m.key] for m in media])
        device = next(self.model.parameters()).device
        return torch.cat([features.to(device, non_blocking=True) for features in self._frozen(media)])

    def _see(self, media: Sequence[Pixels]) -> list[Tensor]:
        vision = self.vision
        self.seen += len(media)
        return vision.kind.features(
            self.model, media, vision.layers, vision.vision_feature_select_strategy == "default"
        )

    @torch.no_grad()
    def _frozen(self, media: Sequence[Pixels]) -> list[Tensor]:
        """Kept ones, and the others computed by the group's ranks in turn. All of them have kept the same: they see the same
        streams in the same order."""
        found = {m.key: self._kept.get(m.key) for m in media if m.key in self._kept}
        missing = list({m.key: m for m in media if m.key not in found}.values())
        for number, medium in enumerate(missing):
            if number % self.group.size() == self.group.rank():
                found[medium.key] = self._compute(medium)
        for number, medium in enumerate(missing):
            source = number % self.group.size()
            found[medium.key] = self._shared(medium, found.get(medium.key), source)
            self._kept.put(medium.key, found[medium.key])
        return [found[m.key] for m in media]

    def _shared(self, medium: Pixels, features: Tensor | None, source: int) -> Tensor:
        if self.group.size() == 1:
            return features
        weight, vision = next(self.model.parameters()), self.vision
        t, h, w = vision.kind.grid(vision.tower_config, medium.patches)
        shape = t * h * w, vision.feature_size
        held = (
            features.to(weight.device)
            if features is not None
            else torch.empty(shape, dtype=weight.dtype, device=weight.device)
        )
        assert held.shape == shape, f"{tuple(held.shape)} features, not {shape}"
        return broadcast(held, source, self.group).cpu()

    def _compute(self, medium: Pixels) -> Tensor:
        """[n, f] on the host."""
        if self.vision.cache_folder is not None and self._folder is None:
            self._folder = FeatureFolder(
                self.vision.cache_folder, self._digest(), int(self.vision.cache_folder_gib * 2**30)
            )
        see = partial(self._on_host, medium)
        return see() if self._folder is None else self._folder.features(medium.key, see)

    def _on_host(self, medium: Pixels) -> Tensor:
        return self._see([medium])[0].cpu()

    def _digest(self) -> str:
        """Of all that features depend on but the pixels."""
        import xxhash

        vision = self.vision
        digest = xxhash.xxh3_128()
        said = [vision.tower_config, vision.vision_feature_layer, vision.vision_feature_select_strategy]
        digest.update(json.dumps(said, sort_keys=True).encode())
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
