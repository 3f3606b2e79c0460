"""Of what type a tensor's device is, for those who choose by it: kernels, precision, memory budgets."""

from __future__ import annotations

import torch

__all__ = ["device_type"]


def device_type(device: torch.device) -> str:
    """Either "cpu" or "cuda".

    A tensor on "meta" has no memory and nothing is computed on it: it stands for one of a GPU, so that whole steps can be
    tried as they would run there, on a machine that has none.
    """
    return "cuda" if device.type == "meta" else device.type
