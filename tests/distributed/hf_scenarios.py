"""What every rank does in the tests of Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.hf import export_hf, hf_model_config, load_hf_weights, read_hf_config
from megatron_ext.hf.gather import HostTensors, gather_hf
from megatron_ext.hf.mapping import hf_shapes
from megatron_ext.models import PrefixGroupedGPT, build_gpt
from megatron_ext.models.prompt_streams import text_logits

__all__ = ["import_and_export"]


def import_and_export(
    device: torch.device, layout: dict, cases: list[tuple[Path, Path]], texts: list[list[int]], largest: int
) -> tuple[list[list[torch.Tensor]], list[list[dict[str, torch.Tensor]]]]:
    """Read each folder, answer, write it again, and gather it.

    Returns:
        Logits [tokens, v] by case and text, and by case what rank 0 has gathered: untied, and in bf16 as it is.
    """
    answers, gathered = [], []
    for source, target in cases:
        routed = read_hf_config(source)["num_moe_experts"] is not None
        changes = {"sequence_parallel": True} if routed and layout.get("tensor_model_parallel_size", 1) > 1 else {}
        model = build_gpt(hf_model_config(source, precision="32", **layout | changes), device)
        with torch.no_grad():
            for parameter in model.parameters():  # what is not read shows
                parameter.fill_(float("nan"))
        load_hf_weights(source, model)
        answers.append([text_logits(model, text).cpu() for text in texts])
        export_hf(model, target, source=source, max_shard_size=largest)
        gathered.append([gather(model, torch.float32, True, largest), gather(model, torch.bfloat16, False, largest)])
    return answers, gathered


def gather(model: PrefixGroupedGPT, dtype: torch.dtype, untied: bool, chunk_bytes: int) -> dict[str, torch.Tensor]:
    target = None
    if dist.get_rank() == 0:
        target = HostTensors(hf_shapes(model.model_config, untied), dtype, chunk_bytes)
        for chunk in target.chunks:
            chunk.fill_(float("nan"))  # what is not filled shows
    gather_hf(model, target, dtype, untied)
    return {} if target is None else target.tensors
