"""Folders of Hugging Face models with weights of 8 and 4 bits, as the families that have such are published."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_ext.hf.files import SINGLE_FILE
from tests.hf_folders import set_config
from tests.hf_models import make_hf_model

__all__ = ["BLOCK", "QUANTISED", "in_8_bits", "make_4_bits", "make_8_bits"]

BLOCK = (8, 8)
QUANTISED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
# transformers wants blocks to divide every matrix, which those of DeepSeek-V3 do not.
DIVIDING = {"kv_lora_rank": 24, "qk_rope_head_dim": 8}
PLAIN = ("embed_tokens.weight", "lm_head.weight", "gate.weight", "norm.weight", "_bias")


def in_8_bits(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as float8, and its scales, by which its numbers fill the type's range."""
    wide = torch.nn.functional.pad(weight.float(), (0, -weight.size(1) % block[1], 0, -weight.size(0) % block[0]))
    blocks = wide.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))  # [rows, in a block, columns, in a block]
    scales = blocks.abs().amax((1, 3)) / 448 + 1e-9
    quantised = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return quantised[: weight.size(0), : weight.size(1)].to(torch.float8_e4m3fn).contiguous(), scales


def make_8_bits(path: Path, rng: torch.Generator) -> None:
    """DeepSeek-V3's kin."""
    make_hf_model(path, "deepseek_v3, one group", rng, **DIVIDING)
    found = {}
    for name, tensor in load_file(str(path / SINGLE_FILE)).items():
        if name.endswith(PLAIN):
            found[name] = tensor
        else:
            found[name], found[f"{name}_scale_inv"] = in_8_bits(tensor, BLOCK)
    save_file(found, str(path / SINGLE_FILE), metadata={"format": "pt"})
    set_config(path, quantization_config=QUANTISED)


def make_4_bits(
    path: Path, rng: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """gpt-oss; returns its plain tensors, and (blocks, scales) of the others."""
    make_hf_model(path, "gpt_oss", rng, intermediate_size=64)
    plain, quantised = load_file(str(path / SINGLE_FILE)), {}
    for name in [name for name in plain if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = plain.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=rng, dtype=torch.uint8)
        quantised[name] = blocks, torch.randint(118, 126, blocks.shape[:-1], generator=rng, dtype=torch.uint8)
    parts = {f"{name}_blocks": blocks for name, (blocks, _) in quantised.items()}
    parts |= {f"{name}_scales": scales for name, (_, scales) in quantised.items()}
    save_file(plain | parts, str(path / SINGLE_FILE), metadata={"format": "pt"})
    set_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return plain, quantised
