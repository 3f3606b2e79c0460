"""The models that a command is given: opened, checked against the ranks, and built on them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from megatron_ext.adapters import LoraConfig
from megatron_ext.blocks.delta import read_delta
from megatron_ext.errors import UserError
from megatron_ext.hf.config import CONFIG_FILE
from megatron_ext.hf.raw import read_json
from megatron_ext.models import GPTModelConfig, PrefixGroupedGPT, build_gpt
from megatron_ext.models.placement import PRECISIONS
from megatron_ext.runtime.distributed import ParallelSizes, initialize, world_size
from recipes.cli.config import build
from recipes.run.pretrained import Pretrained
from tools.converting.arguments import DTYPES

__all__ = ["kept_dtype", "load", "open_source", "own_precision"]


def open_source(path: Path, args: argparse.Namespace, metavar: str) -> Pretrained:
    """The model at a path that the command line gives as `metavar`, which the ranks can hold.

    Raises:
        UserError: see `Pretrained.open`; or --tensor and --pipeline do not divide it, or the processes.
    """
    pretrained = Pretrained.open(str(path), metavar)
    needed = args.tensor * args.pipeline
    if min(args.tensor, args.pipeline) < 1:
        raise UserError(f"--tensor {args.tensor} and --pipeline {args.pipeline} must be at least 1")
    if world_size() % needed:
        raise UserError(
            f"--tensor {args.tensor} x --pipeline {args.pipeline} does not divide the {world_size()} processes that run: start "
            f"them with torchrun --nproc-per-node {needed}, or a multiple of it"
        )
    for option, size, names in (
        ("--tensor", args.tensor, ("num_attention_heads", "ffn_hidden_size")),
        ("--pipeline", args.pipeline, ("num_layers",)),
    ):
        for name in names:
            if (value := pretrained.architecture[name]) % size:
                raise UserError(f"{option} {size} does not divide {name}={value} of {path}; choose another")
    groups = pretrained.architecture["num_query_groups"]
    if groups % args.tensor and args.tensor % groups:
        raise UserError(
            f"--tensor {args.tensor} is neither a divisor nor a multiple of num_query_groups={groups} of {path}; choose "
            "another"
        )
    return pretrained


def load(
    pretrained: Pretrained, args: argparse.Namespace, precision: str, peft: LoraConfig | None = None
) -> PrefixGroupedGPT:
    """This rank's stage; with room for adapters of this kind."""
    layout: dict = {"tensor_model_parallel_size": args.tensor, "pipeline_model_parallel_size": args.pipeline}
    if args.tensor > 1 and pretrained.architecture["num_moe_experts"] is not None:
        layout["sequence_parallel"] = True  # without which experts have no tensor-parallel ranks
    if torch.cuda.is_available():
        layout["attention_kernel"] = "blockwise"  # the fast ones take bf16 alone
    config = build(GPTModelConfig, pretrained.architecture | layout | {"precision": precision}, "model")
    config = dataclasses.replace(config, peft=peft)
    device = initialize(ParallelSizes(args.tensor, args.pipeline))
    model = build_gpt(config, device)
    pretrained.load(model)
    return model


def kept_dtype(folder: Path) -> str | None:
    """The type that a config.json names."""
    if not (folder / CONFIG_FILE).is_file():
        return None
    config = read_json(folder / CONFIG_FILE)
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in DTYPES else None


def own_precision(pretrained: Pretrained, dtype: str | None, delta: Path | None) -> str:
    """The model's own, whatever type it is written in, which rounds; with a delta that of its training, in which it fits.

    Args:
        dtype: what it is written in.
    """
    if delta is None:
        return pretrained.precision or ("bf16" if dtype == "bfloat16" else "32")
    trained = read_delta(delta)[0]["dtype"]
    return next(name for name, kind in PRECISIONS.items() if str(kind) == f"torch.{trained}")
