"""DeepStack: what a vision tower saw at some of its own layers is added behind the decoder's first layers, at the rows of media
(arXiv 2406.04334, as Qwen3-VL has it, 2511.21631).

Megatron's `context` carries the features from layer to layer: a layer that is computed again has gradients of its inputs alone.

Shape legend: s rows of the residual stream on this rank, h hidden size, m rows of media among the stream's, r those of this rank,
d layers that are fed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

__all__ = ["DeepstackLayer", "Shown", "fed_layer"]


@dataclass(frozen=True)
class Shown:
    """What stands in a stream's rows of media.

    Attributes:
        rows: int64 [m], on the host.
        features: [m, (1 + d) h], of each row what stands for its token, then what is added behind the first d layers.
    """

    rows: Tensor
    features: Tensor

    def embedded(self, hidden: Tensor) -> Tensor:
        """Token embeddings [t, 1, h] with media in their places."""
        features = self.features[:, : hidden.size(-1)].unsqueeze(1)
        return hidden.index_put((self.rows.to(hidden.device),), features)

    def behind_layers(self, hidden_size: int, rows: int, split: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """(features [d r, h], one layer's after the other's; int64 [r], where they are added).

        Args:
            rows: of the stream.
            split: ranks that have an equal part of the rows each; None: all are here.
        """
        features, where = self.features[:, hidden_size:], self.rows
        if split is not None:
            # Of each rank's part the gradient is known there alone: all of them add up.
            features = copy_to_tensor_model_parallel_region(features, group=split)
            part = rows // split.size()
            here = (where // part == split.rank()).nonzero().squeeze(1)
            features, where = features.index_select(0, here.to(features.device)), where[here] % part
        # Not -1: a rank may have no rows of media.
        each = features.view(len(where), features.size(1) // hidden_size, hidden_size).transpose(0, 1)
        return each.reshape(-1, hidden_size), where.to(features.device)


class DeepstackLayer(TransformerLayer):
    """One of the decoder's first d layers.

    Args:
        last: no later one is fed.
    """

    def __init__(self, *args, last: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.last = last

    def forward(self, *args, context: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """hidden states [s, 1, h] and features [d r, h], None where the stream has no media -> the same."""
        hidden, _ = super().forward(*args, context=None, **kwargs)
        if context is None:
            return hidden, None
        rows, layer = kwargs["packed_seq_params"].media_rows, self.layer_number - 1
        added = context[layer * len(rows) : (layer + 1) * len(rows)].unsqueeze(1)
        return hidden.index_add(0, rows, added), None if self.last else context


def fed_layer(layer: ModuleSpec, last: bool) -> ModuleSpec:
    """The spec of a layer that is fed."""
    assert layer.module is TransformerLayer, layer.module
    return ModuleSpec(DeepstackLayer, params=layer.params | {"last": last}, submodules=layer.submodules)
