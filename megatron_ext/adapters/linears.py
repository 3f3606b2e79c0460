"""Megatron's linears with an adapter each. Their own weight keeps its name; the adapter's are beside it, under `lora`."""

from __future__ import annotations

from typing import Any, Self

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_ext.adapters.lora import Lora, LoraShape

__all__ = ["Adapted"]


class Adapted:
    """Before one of Megatron's linears in a class's bases; see `of`.

    Attributes:
        column: whether it is column-parallel; else it is row-parallel.
        lora: None: it has been taken away.
        uses_adapter: False: the linear computes what it does without.
    """

    column: bool
    shape: LoraShape  # of a class that `of` has made
    uses_adapter: bool = True

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        own = self.column, self.input_size, self.tp_group, self.sequence_parallel, self.is_expert, self.weight
        self.lora: Lora | None = Lora(self.shape, *own)

    @classmethod
    def of(cls, linear: type, shape: LoraShape) -> type[Self]:
        """This linear's class with adapters of this shape: a class is what every version of Megatron builds from a spec.

        Args:
            linear: a `ColumnParallelLinear` or `RowParallelLinear`.
        """
        column = issubclass(linear, ColumnParallelLinear)
        return type(f"Adapted{linear.__name__}", (cls, linear), {"shape": shape, "column": column})

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **options)
        if self.lora is not None and self.uses_adapter:
            output = self.lora(input_, output)
        return output, bias

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """`Lora.factors`; None: the linear computes what it does without."""
        return self.lora.factors() if self.lora is not None and self.uses_adapter else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.lora is not None:  # which Megatron takes for weights that each rank has all of
            found |= make_sharded_tensors_for_checkpoint(
                self.lora.state_dict(keep_vars=True), f"{prefix}lora.", self.lora.axes, sharded_offsets,
                tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
            )  # fmt: skip
        return found

    @torch.no_grad()
    def merged_weight(self, b: Tensor | None = None) -> Tensor:
        """The weight with the adapter in it, summed in fp32, in its type; see `Lora.delta`."""
        return (self.weight.float() + self.lora.delta(b)).to(self.weight.dtype)
