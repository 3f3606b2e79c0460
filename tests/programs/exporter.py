"""Exports one and the same model to the folder that it is told, with files of limited length if asked: to be killed."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from megatron_ext.errors import UserError
from megatron_ext.hf import export_hf
from megatron_ext.models import build_gpt
from megatron_ext.runtime.cpu import adapt_megatron_to_cpu
from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed
from tests.gpt_cases import small_config
from tests.programs.forking import fork_for_each_line, say


def child(folder: str, limit: str) -> None:
    device = initialize(ParallelSizes())
    set_seed(1)
    model = build_gpt(small_config(hidden_size=128, num_layers=4, ffn_hidden_size=512, add_qkv_bias=False), device)
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    say("ready")
    try:
        export_hf(model, Path(folder), max_shard_size=300_000)
        say("done")
    except UserError as error:
        say("failed", error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    adapt_megatron_to_cpu()
    fork_for_each_line(child)
