"""Whether a draw lies so near to where a result jumps that rounding would decide it: which experts a token takes, which token is
the likeliest, whether a clamp or a clipped ratio still has a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CLEAR", "Edges"]

CLEAR = 5e-5  # numbers around 1 differ by 1e-6 or so where fp32 sums are taken in another order

ATEN = torch.ops.aten
CLAMPS = {
    ATEN.clamp.default: (1, 2), ATEN.clamp.Tensor: (1, 2), ATEN.clamp_max.default: (None, 1), ATEN.clamp_min.default: (1, None),
}  # fmt: skip


class Edges(TorchDispatchMode):
    """What is computed within is looked at.

    Args:
        kinds: what is looked at, of "topk", "argmax" and "clamp"; nothing: all. A clamp jumps only in its gradient, and is looked
            at where there is one.

    Attributes:
        nearest: how far the nearest number was from being taken otherwise.
    """

    def __init__(self, *kinds: str):
        super().__init__()
        self.kinds = kinds or ("topk", "argmax", "clamp")
        self.nearest = math.inf

    @property
    def clear(self) -> bool:
        return self.nearest > CLEAR

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].numel():
            if function is ATEN.topk.default and "topk" in self.kinds:
                self._of_last_and_next(*args, **kwargs)
            elif function is ATEN.argmax.default and "argmax" in self.kinds:
                self._of_last_and_next(args[0], 1, *args[1:2])
            elif function in CLAMPS and "clamp" in self.kinds and args[0].requires_grad:
                for place, name in zip(CLAMPS[function], ("min", "max"), strict=True):
                    edge = args[place] if place is not None and place < len(args) else kwargs.get(name)
                    if edge is not None:
                        self._note((args[0] - edge).abs())
        return function(*args, **kwargs)

    def _of_last_and_next(self, x: Tensor, k: int, dim: int | None = -1, largest: bool = True, *_) -> None:
        """The last that is taken and the first that is not."""
        x = (x.flatten() if dim is None else x.movedim(dim, -1)) * (1 if largest else -1)
        if k < x.size(-1):
            last, after = x.topk(k + 1).values[..., k - 1 :].unbind(-1)
            self._note(last - after)

    def _note(self, distances: Tensor) -> None:
        """Between two that are left out, both at minus infinity, there is none."""
        self.nearest = min(self.nearest, distances.nan_to_num(nan=math.inf, posinf=math.inf).min().item())
