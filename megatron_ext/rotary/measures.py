"""How a position scheme treats places of a video, measured without training.

A text right after a video looks back at it. All video tokens hold the same content, so that what the text attends to is
the scheme's doing alone: K(q, k) = mean_i cos((p_q,i - p_k,i) theta_i), logits sqrt(d) K, softmax over all video tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.rotary.items import Text, Video
from megatron_ext.rotary.schemes import Scheme, find_scheme, layout

__all__ = ["Bias", "attention_map", "measure"]


@dataclass(frozen=True)
class Bias:
    """What `measure` finds.

    Attributes:
        map: fp64 [h, w], attention to each place summed over frames, mean 1.
        largest_over_smallest, variation: of the map; variation is the standard deviation over the mean.
        asymmetry: mean |map - map turned by 180 degrees| / 2.
        tilt: norm of the slope of log(map) along rows and columns, per cell.
        temporal_steepness: attention to the most favoured frame over the least favoured.
        text_gap: mean distance of indices from the last frame to the first text token, over tokens and pairs that are turned.
    """

    map: Tensor
    largest_over_smallest: float
    variation: float
    asymmetry: float
    tilt: float
    temporal_steepness: float
    text_gap: float


def attention_map(video: Video, scheme: Scheme, head_dim: int, base: float, queries: int = 64) -> Tensor:
    """Attention of the `queries` text tokens after a video to its tokens, averaged: fp64 [t, h, w], sum 1."""
    pairs = head_dim // 2
    axes = scheme.axes_of_pairs(pairs)
    ids = layout([video, Text(queries)], scheme).ids.double()[[axis or 0 for axis in axes]]  # [pairs, tokens]
    turned = torch.tensor([[axis is not None] for axis in axes])
    angles = turned * ids * base ** (-torch.arange(pairs, dtype=torch.float64) / pairs).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    # cos(a - b) = cos a cos b + sin a sin b: one matrix product instead of pairs x queries x tokens cosines.
    key, query = (torch.cat((cos[:, rows], sin[:, rows])) for rows in (slice(video.length), slice(video.length, None)))
    logits = query.t() @ key / pairs * head_dim**0.5  # [queries, tokens]
    return logits.softmax(-1).mean(0).view(video.t, video.views * video.h, video.w)


def measure(video: Video, scheme: str | Scheme, head_dim: int = 128, base: float = 1e4, queries: int = 64) -> Bias:
    """All measures of one scheme on one video."""
    scheme = find_scheme(scheme) if isinstance(scheme, str) else scheme
    attention = attention_map(video, scheme, head_dim, base, queries)
    places = attention.sum(0)
    places = places / places.mean()  # [h, w]
    frames = attention.sum((1, 2))
    table = layout([video], scheme)
    turned = [axis for axis in scheme.axes_of_pairs(head_dim // 2) if axis is not None]
    last = table.ids[:, -video.length // video.t :][turned].double()
    return Bias(
        map=places,
        largest_over_smallest=float(places.max() / places.min()),
        variation=float(places.std(correction=0)),
        asymmetry=float((places - places.flip(0, 1)).abs().mean() / 2),
        tilt=_tilt(places.log()),
        temporal_steepness=float(frames.max() / frames.min()),
        text_gap=float((table.next_index - last).mean()),
    )


def _tilt(values: Tensor) -> float:
    """Norm of the least-squares slope of [h, w] along both axes; rows and columns are orthogonal on a full grid."""
    slopes = []
    for axis in (0, 1):
        place = torch.arange(values.size(axis), dtype=values.dtype)
        place = place - place.mean()
        mean = values.mean(1 - axis)
        slopes.append(float((place * mean).sum() / place.square().sum()) if len(place) > 1 else 0.0)
    return (slopes[0] ** 2 + slopes[1] ** 2) ** 0.5
