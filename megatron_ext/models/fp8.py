"""Linears in numbers of 8 bits, Transformer Engine's: what their inputs must be like, and which GPU has them. Not yet run.

Weights stay in bf16, and are turned into 8 bits anew in every forward pass: kept from one to the next, as Megatron would, they
would be those of before the last step in sampling, and of the reference in what follows its pass. Scales come from the numbers
themselves in every recipe that we take, so that nothing of FP8 is in a checkpoint.
"""

from __future__ import annotations

import importlib.util

import torch

from megatron_ext.errors import UserError

__all__ = ["FP8_ROWS", "check_fp8"]

# Recipe -> rows and channels of a product are multiples of this (`get_fp8_align_size` of megatron-core).
FP8_ROWS = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
# Recipe -> the least compute capability of a GPU that has it, and its name.
CAPABILITIES = {"tensorwise": ((8, 9), "Ada"), "blockwise": ((9, 0), "Hopper"), "mxfp8": ((10, 0), "Blackwell")}


def check_fp8(recipe: str) -> None:
    """Raises UserError where this rank's GPU, or what is installed, does not have it."""
    least, name = CAPABILITIES[recipe]
    if (found := torch.cuda.get_device_capability()) < least:
        raise UserError(
            f"model.fp8_recipe={recipe} needs a GPU of compute capability {least[0]}.{least[1]} ({name}) or higher, and this one "
            f"has {found[0]}.{found[1]}; set model.fp8=null or another recipe"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "model.fp8 needs Transformer Engine, which is not installed here; install it, or set model.fp8=null"
        )
