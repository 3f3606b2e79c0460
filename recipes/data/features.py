"""Features of a clip that another encoder has computed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from recipes.data.errors import VideoError

__all__ = ["map_features"]


def map_features(path: Path, where: str) -> Tensor:
    """[t, h, w, f] of a .npy or of a .safetensors with one tensor, in its own type; numbers are read when they are used."""
    try:
        if path.suffix == ".npy":
            import numpy as np

            found = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                names = list(file.keys())
                if len(names) != 1:
                    raise UserError(f"it holds {len(names)} tensors, expected one")
                found = file.get_tensor(names[0])  # mapped, too
        else:
            raise UserError("features are a .npy or a .safetensors file")
    except Exception as error:  # safetensors raises its own, numpy several
        raise VideoError(f"{where}: cannot read features {path}: {str(error)[:200]}") from error
    if found.dim() != 4 or not found.numel() or not found.is_floating_point():
        raise VideoError(f"{where}: {path} holds {found.dtype} {tuple(found.shape)}, expected floats [t, h, w, f]")
    return found
