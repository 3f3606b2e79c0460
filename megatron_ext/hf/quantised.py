"""Weights of 8 and 4 bits with a scale for each block, made numbers where they are read.

FP8, as DeepSeek-V3 is published (arXiv 2412.19437, section 3.3.2): a matrix `NAME.weight` is float8 (e4m3), and fp32
`NAME.weight_scale_inv` [row blocks, column blocks] is what the numbers of a block are multiplied by.

MXFP4, as gpt-oss is (OCP Microscaling Formats 1.0): `NAME_blocks` [experts, outputs, inputs / 32, 16] has two numbers of 4 bits
(e2m1) in a byte, the lower half first, and `NAME_scales` [experts, outputs, inputs / 32] the power of two, plus 127, of each 32.

What is read is the product in fp32, rounded to the parameter's type.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.hf.files import CODES, DTYPES, Stored

__all__ = ["check_quantisation", "decode", "one_of_all", "stored_width", "with_scales"]

logger = logging.getLogger(__name__)

SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
MXFP4 = (1, 32)  # rows and columns of a block
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS = 127  # of a block's exponent


def check_quantisation(raw: dict[str, Any], where: str) -> tuple[int, int] | None:
    """Rows and columns of a block, of what a config.json says of its weights; None: they are plain numbers.

    Raises:
        UserError: they are quantised in a way that is not read.
    """
    given = raw.get("quantization_config")
    if not given:
        return None
    said = given if isinstance(given, dict) else {}
    method, block = said.get("quant_method"), said.get("weight_block_size")
    if method == "mxfp4":
        return MXFP4
    known = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if method != "fp8" or said.get("fmt", "e4m3") != "e4m3" or not known:
        raise UserError(
            f"{where}: quantised weights (quantization_config of quant_method={method!r}) are not read, only mxfp4, and fp8 in "
            "e4m3 with a weight_block_size; take the model without them"
        )
    return block[0], block[1]


def with_scales(found: dict[str, Stored], block: tuple[int, int] | None) -> dict[str, Stored]:
    """Tensors of a folder, those of fewer bits with the scales that belong to them.

    Raises:
        UserError: scales of another shape than the blocks'.
    """
    if block is None:
        return found
    joined = dict(found)
    for name, scales in found.items():
        of_4_bits = name.endswith(SCALES)
        base = name.removesuffix(SCALES if of_4_bits else SCALE)
        weight = found.get(base + BLOCKS if of_4_bits else base)
        if weight is None or base == name or weight.dtype not in CODES:
            continue
        if of_4_bits:
            expected, there = weight.shape[:-1], len(weight.shape) == 4 and (weight.dtype, scales.dtype) == ("U8", "U8")
            whole = there and weight.shape[-1] * 2 == block[1]
        else:
            expected = tuple(-(-size // of_block) for size, of_block in zip(weight.shape, block, strict=False))
            whole = len(weight.shape) == 2 and scales.dtype in DTYPES
        if not whole or scales.shape != expected:
            raise UserError(
                f"{scales.file} is damaged: {name} is {scales.dtype} {scales.shape}, and blocks of {block} make it {expected}; "
                "fetch it again"
            )
        del joined[name]
        if of_4_bits:
            del joined[base + BLOCKS]
            *outer, blocks, _ = weight.shape
            weight = dataclasses.replace(weight, shape=(*outer, blocks * block[1]), turned=True)
        joined[base] = dataclasses.replace(weight, scales=scales, block=block)
    logger.info("weights of fewer bits become plain numbers as they are read")
    return joined


def stored_width(stored: Stored) -> int:
    """Numbers of its type in a row; of 4 bits two are one."""
    return math.prod(stored.shape[1:]) // (2 if stored.scales is not None and stored.dtype == "U8" else 1)


def one_of_all(stored: Stored, number: int) -> Stored:
    """An expert's part of a tensor of all experts of a layer, as a matrix; a row of a matrix as one of a single row."""
    _, *shape = stored.shape
    numbers = math.prod(shape) // (2 if stored.scales is not None else 1)
    start = stored.start + number * numbers * (DTYPES | CODES)[stored.dtype].itemsize
    scales = stored.scales and one_of_all(stored.scales, number)
    return dataclasses.replace(stored, shape=tuple(shape), start=start, scales=scales)


def decode(read: Tensor, scales: Tensor, block: tuple[int, int], first: int) -> Tensor:
    """Rows of 8 bits [rows, columns], or of 4 bits [rows, columns / 2] of two each, of which the first is number `first` of its
    matrix, as fp32 [rows, columns].

    Args:
        scales: [row blocks, column blocks], of the whole matrix: fp32, or of 4 bits a byte.
        block: rows and columns of a block.
    """
    if read.dtype == torch.uint8:
        values = torch.tensor([*E2M1, *(-value for value in E2M1)])
        wide = torch.stack((values[(read & 15).int()], values[(read >> 4).int()]), -1).flatten(1)
        powers = (scales[first : first + len(read)].int() - BIAS).repeat_interleave(block[1], 1)
        return torch.ldexp(wide, powers)
    rows = torch.arange(first, first + len(read)) // block[0]
    return read.float() * scales[rows].repeat_interleave(block[1], 1)[:, : read.size(1)]
