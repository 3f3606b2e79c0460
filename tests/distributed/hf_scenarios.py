"""What every rank does in the tests of Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ext.hf import export_hf, hf_model_config, load_hf_weights
from megatron_ext.models import build_gpt
from megatron_ext.models.prompt_streams import text_logits

__all__ = ["import_and_export"]


def import_and_export(
    device: torch.device, layout: dict, cases: list[tuple[Path, Path]], texts: list[list[int]], largest: int
) -> list[list[torch.Tensor]]:
    """Read each folder, answer, and write it again. Returns logits [tokens, v] by case and text."""
    answers = []
    for source, target in cases:
        model = build_gpt(hf_model_config(source, precision="32", **layout), device)
        with torch.no_grad():
            for parameter in model.parameters():  # what is not read shows
                parameter.fill_(float("nan"))
        load_hf_weights(source, model)
        answers.append([text_logits(model, text).cpu() for text in texts])
        export_hf(model, target, source=source, max_shard_size=largest)
    return answers
