"""The state of every random number generator of a rank, as tensors, so that it can be kept without pickle."""

from __future__ import annotations

import random

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

__all__ = ["get_rng_state", "set_rng_state"]


def get_rng_state() -> dict[str, Tensor]:
    """Python's, numpy's, torch's and Megatron's generators; the device's, too, where that is a GPU."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  libraries draw from the global one
    assert (version, name) == (3, "MT19937")
    state = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.concatenate([keys.astype(np.int64), [position, has_gauss]])),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state | {f"megatron.{key}": value for key, value in get_cuda_rng_tracker().get_states().items()}


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Undo whatever has been drawn since `get_rng_state`."""
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    keys = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    prefix = "megatron."
    get_cuda_rng_tracker().set_states({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
