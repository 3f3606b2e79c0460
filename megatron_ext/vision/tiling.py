"""An image cut into tiles of its tower's size, beside one tile that shows all of it: the "anyres" of LLaVA-1.6 and OneVision.

An image is brought to the one of several sizes that shows it best, in its own shape, with bars where it does not fill it. The
tower sees tile by tile; of the features put together again the bars are cut off, and in OneVision what is still more than so
many tiles is brought to that many by interpolation (arXiv 2408.03326; transformers, `pack_image_features` of llava_next and
llava_onevision).
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

from megatron_ext.errors import UserError

__all__ = ["Tiling", "most_tiles", "plan_tiling", "sizes_of"]

LARGEST = 6  # tiles side by side in the sizes that transformers assumes
SHRINKS = 1.1  # below that nothing is interpolated


@dataclass(frozen=True)
class Tiling:
    """How the features of an image's tiles are put together, in patches.

    Attributes:
        rows, columns: of tiles.
        top, left: of bars, on both sides of the image.
        height, width: between them.
        kept: (height, width) that they are brought to.
    """

    rows: int
    columns: int
    top: int
    left: int
    height: int
    width: int
    kept: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in tokens; a learnt one ends every row."""
        return self.kept[0], self.kept[1] + 1


def sizes_of(side: int) -> list[list[int]]:
    """The sizes, height and width, that transformers cuts images in where none are given: up to 6 x 6 tiles."""
    steps = range(side, side * LARGEST + 1, side)
    return [[height, width] for height in steps for width in steps]


def most_tiles(aspect: Any) -> float | None:
    """N of "anyres_max_N", without end for "anyres"; None: it is neither."""
    if aspect == "anyres":
        return math.inf
    found = re.fullmatch(r"anyres_max_([1-9][0-9]*)", aspect) if isinstance(aspect, str) else None
    return int(found[1]) if found else None


@functools.lru_cache(1 << 12)
def plan_tiling(
    height: int, width: int, sizes: tuple[tuple[int, int], ...], side: int, patches: int, most: float
) -> Tiling:
    """
    Args:
        height, width: of the image, in pixels.
        sizes: that it may be brought to, multiples of `side`, the height and width of a tile.
        patches: side by side in a tile.
        most: tiles whose patches may stand for the image; may be without end.

    Raises:
        UserError: it is so thin that no row would be left.
    """
    from transformers.image_processing_utils import select_best_resolution

    best = select_best_resolution((height, width), sizes)
    rows, columns = best[0] // side, best[1] // side
    high, wide, top, left = rows * patches, columns * patches, 0, 0
    # As transformers rounds it, lest a product in floats that is nearly whole falls on the other side.
    if width / height > wide / high:
        top = (high - int(round(height * (wide / width), 7))) // 2
    else:
        left = (wide - int(round(width * (high / height), 7))) // 2
    high, wide = high - 2 * top, wide - 2 * left
    ratio = math.sqrt(high * wide / (most * patches**2))
    kept = (int(high // ratio), int(wide // ratio)) if ratio > SHRINKS else (high, wide)
    # Rows without a column are still ended by their tokens, but nothing can be interpolated to none.
    if not kept[0] or (ratio > SHRINKS and not kept[1]):
        raise UserError(
            f"a picture of {height} x {width} pixels is too thin: cut into tiles it leaves {kept[0]} x {kept[1]} patches"
        )
    return Tiling(rows, columns, top, left, high, wide, kept)
