"""A pipeline rank's part of a model in several pieces: Megatron's virtual pipeline stages, its interleaved schedule.

Stage s of S runs the pieces s, S + s, 2 S + s, ... of the model: a stream goes round all ranks once for each piece, and a rank
idles so many times less while the pipeline fills and empties.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["ModelPieces", "layers_of", "pieces_of", "streams_per_turn"]


class ModelPieces(torch.nn.ModuleList):
    """The pieces of one pipeline rank, first to last, with what they all share.

    Attributes:
        config, model_config, pg_collection: the pieces'.
    """

    @property
    def config(self) -> TransformerConfig:
        return self[0].config

    @property
    def model_config(self):
        return self[0].model_config

    @property
    def pg_collection(self):
        return self[0].pg_collection

    def sharded_state_dict(self) -> dict[str, Any]:
        """For a distributed checkpoint; a tensor's key there is what it is in the whole model."""
        return {
            f"{number}.{name}": value
            for number, piece in enumerate(self)
            for name, value in piece.sharded_state_dict().items()
        }


def pieces_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """A rank's pieces: the model itself where it is in one."""
    return list(model) if isinstance(model, ModelPieces) else [model]


def layers_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The transformer layers of this rank."""
    for piece in pieces_of(model):
        yield from piece.decoder.layers


def streams_per_turn(streams: int, stages: int) -> int:
    """How many streams a rank runs through one piece before it turns to the next: the fewest that Megatron's schedule takes.

    It takes no fewer than there are stages, nor a last turn of fewer.

    Args:
        streams: at least as many as stages.
    """
    for size in range(stages, streams):
        if streams % size == 0 or streams % size >= stages:
            return size
    return streams
