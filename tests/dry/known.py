"""What tensors without memory would hold, of the few whose values decide shapes: who takes which expert, what patches a tower is
shown, and what is counted of that. It is declared where it would be computed or written down, and followed through operations and
views from there.

Shape legend: t rows, e experts, k experts of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["Known", "routing"]

GATHER = "c10d::_allgather_base_"


def routing(shape: torch.Size, topk: int) -> Tensor:
    """Which experts rows take, bool [t, e], with k of each row: some experts have many rows, some few or none."""
    rows, experts = shape
    first = torch.arange(rows) // 3 * 5 % experts
    taken = torch.zeros(rows, experts, dtype=torch.bool)
    return taken.scatter_(1, (first.unsqueeze(1) + torch.arange(topk)) % experts, True)


class Known:
    """Values by storage, so that views have them and what is written through a view is seen."""

    def __init__(self):
        self._of: dict[
            int, tuple[torch.UntypedStorage, Tensor]
        ] = {}  # with the storage, or its address would be another's

    def declare(self, x: Tensor, values: Tensor) -> None:
        """x of the device holds this."""
        storage = x.untyped_storage()
        flat = torch.zeros(storage.nbytes() // x.element_size(), dtype=x.dtype, device="cpu")
        self._of[storage._cdata] = storage, flat
        self._view(flat, x).copy_(values)

    def values(self, x: Tensor) -> Tensor | None:
        """Of the device's tensor, on the host; None: nobody knows."""
        _, flat = self._of.get(x.untyped_storage()._cdata, (None, None))
        return None if flat is None or flat.dtype != x.dtype else self._view(flat, x)

    def computed(self, function, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What an operation gives on the host; None: not all that it is given is known."""
        if any(self.values(x) is None for x in _tensors((args, kwargs)) if x.is_meta):
            return None
        kwargs = {name: "cpu" if name == "device" else value for name, value in kwargs.items()}
        return function(*tree_map_only(Tensor, self._seen, args), **tree_map_only(Tensor, self._seen, kwargs))

    def follow(self, function, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """An operation has given `out`: it is known where all that it was given is, and unknown else."""
        if not any(self.values(x) is not None for x in _tensors((args, kwargs)) if x.is_meta):
            return
        if function._schema.name == GATHER:  # what other ranks have is what this one has
            to, mine = args[:2]
            values = self.values(mine)
            self.declare(to, values.repeat(to.numel() // mine.numel(), *[1] * (mine.dim() - 1)).view(to.shape))
        elif (found := self.computed(function, args, kwargs)) is not None:
            for x, values in zip(_tensors(out), _tensors(found), strict=True):
                if self.values(x) is None:
                    self.declare(x, values)
        else:
            for argument, x in zip(function._schema.arguments, args, strict=False):
                if isinstance(x, Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                    self._of.pop(x.untyped_storage()._cdata, None)

    def _seen(self, x: Tensor) -> Tensor:
        return self.values(x) if x.is_meta else x

    @staticmethod
    def _view(flat: Tensor, x: Tensor) -> Tensor:
        return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def _tensors(found: Any) -> Iterator[Tensor]:
    return (x for x in tree_flatten(found)[0] if isinstance(x, Tensor))
