"""What a tower is shown of one image or video.

Shape legend: p patches, or T frames of H x W pixels; f numbers of a patch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.vision.tiling import Tiling

__all__ = ["Pixels"]


@dataclass(frozen=True, eq=False)
class Pixels:
    """An image or video as its tower takes it, resized and normalised.

    Attributes:
        values: fp32, frames [T, 3, H, W], or patches [p, f] in the tower's order.
        patches: (t, h, w) of its patches, before the tower merges any.
        video: it is one, which some connectors bring into fewer tokens than images. What the tower makes of it is the same.
        tiling: of an image that is cut into tiles: frames are the whole of it, and then they. What the tower makes of them is
            the same.
    """

    values: Tensor
    patches: tuple[int, int, int]
    video: bool = False
    tiling: Tiling | None = None

    @functools.cached_property
    def key(self) -> str:
        """XXH3 of what is seen: the same for one content, whatever its file is called."""
        import xxhash

        digest = xxhash.xxh3_128(repr((self.patches, tuple(self.values.shape))).encode())
        digest.update(self.values.contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
