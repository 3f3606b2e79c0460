"""Hugging Face models in and out of Megatron, in safetensors; which families: docs/huggingface.md.

    python tools/convert_hf.py export runs/grpo/checkpoints/final runs/my-model     # a folder that transformers, vLLM, ... load
    python tools/convert_hf.py verify ~/models/Qwen2.5-0.5B --text "The capital of France is"
    python tools/convert_hf.py import ~/models/Qwen2.5-0.5B runs/qwen               # a checkpoint; recipes need none, see below
    python tools/convert_hf.py adapter runs/lora/checkpoints/final runs/my-adapter  # that PEFT loads; vLLM without experts
    python tools/convert_hf.py merge ~/models/Qwen2.5-0.5B runs/my-adapter runs/merged
    python tools/convert_hf.py patch runs/lftf/delta.safetensors ~/models/Qwen2.5-0.5B runs/block.safetensors
    python tools/convert_hf.py apply ~/models/Qwen2.5-0.5B runs/block.safetensors runs/mended

A model that is too large for one process is spread over ranks by torchrun, whatever the layout that it was trained on:

    torchrun --nproc-per-node 8 tools/convert_hf.py export --tensor 4 --pipeline 2 runs/grpo/checkpoints/final runs/my-model

Recipes read a Hugging Face folder themselves: pretrained_checkpoint.restore_from_path=~/models/Qwen2.5-0.5B. Nothing is ever
overwritten, and what is written appears under its name when it is whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError
from recipes.cli.errors import user_errors
from tools.converting.arguments import arguments


def run_import(args: argparse.Namespace) -> str:
    from megatron_ext.hf.files import check_target
    from megatron_ext.models import GPTModelConfig
    from megatron_ext.runtime.checkpoint import save_checkpoint
    from recipes.data.tokenizer import load_tokenizer
    from tools.converting.sources import kept_dtype, load, open_source

    check_target(args.target)
    pretrained = open_source(args.source, args, "HF_FOLDER")
    if not pretrained.hugging_face:
        raise UserError(f"{args.source} is a checkpoint of ours already; import takes a Hugging Face folder")
    tokenizer = load_tokenizer(args.source)
    model = load(pretrained, args, args.precision or ("bf16" if kept_dtype(args.source) == "bfloat16" else "32"))
    fields = {f.name for f in dataclasses.fields(GPTModelConfig)}
    info = {"model": {k: v for k, v in dataclasses.asdict(model.model_config).items() if k in fields}}

    def companions(folder: Path) -> None:
        tokenizer.save(folder / "tokenizer")
        pretrained.copy_source(folder)

    args.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(args.target, model, info, save_more=companions)
    return f"checkpoint in {args.target}, precision {model.model_config.precision}"


def run_export(args: argparse.Namespace) -> str:
    import torch

    from megatron_ext.blocks.delta import apply_delta
    from megatron_ext.hf import export_hf
    from megatron_ext.hf.config import CONFIG_FILE
    from megatron_ext.hf.files import check_target
    from megatron_ext.runtime.checkpoint import read_checkpoint_info
    from megatron_ext.runtime.checkpoint_files import check_files
    from recipes.run.pretrained import SOURCE_FOLDER
    from tools.converting.sources import kept_dtype, load, open_source, own_precision

    check_target(args.target)
    pretrained = open_source(args.source, args, "CHECKPOINT")
    folder = (
        pretrained.folder
    )  # what the source was when it was opened: a link such as latest moves while its run goes on
    kept = folder / SOURCE_FOLDER
    like = args.like or (args.source if pretrained.hugging_face else kept if (kept / CONFIG_FILE).is_file() else None)
    tokenizer = folder / "tokenizer"
    dtype = args.dtype or (kept_dtype(like) if like else None)
    model = load(pretrained, args, own_precision(pretrained, dtype, args.delta))
    for part in () if pretrained.hugging_face else ("tokenizer", SOURCE_FOLDER):
        check_files(folder, part, read_checkpoint_info(folder)["files"])
    if args.delta:
        apply_delta(args.delta, model)
    where = tokenizer if tokenizer.is_dir() and not args.like else None
    args.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    export_hf(model, args.target, like, where, getattr(torch, dtype) if dtype else None, args.max_shard_size)
    shown = args.source / SOURCE_FOLDER if like == kept else like
    described = f"config.json like {shown}'s" if like else "config.json made for it"
    return f"Hugging Face folder in {args.target}, {dtype or str(model.model_config.dtype).removeprefix('torch.')}, {described}"


def run_merge(args: argparse.Namespace) -> str:
    import torch

    from megatron_ext.adapters import LoraConfig
    from megatron_ext.blocks.delta import apply_delta
    from megatron_ext.hf import export_hf
    from megatron_ext.hf.config import CONFIG_FILE
    from megatron_ext.hf.files import check_target
    from megatron_ext.runtime.checkpoint import read_checkpoint_info
    from megatron_ext.runtime.checkpoint_files import checksum
    from recipes.cli.config import build
    from recipes.run.adapters import StartAdapter
    from recipes.run.pretrained import SOURCE_FOLDER
    from tools.converting.sources import kept_dtype, load, open_source, own_precision

    check_target(args.target)
    pretrained = open_source(args.source, args, "MODEL")
    adapter = StartAdapter.open(str(args.adapter), "ADAPTER")
    if adapter.theirs is not None:
        peft = adapter.theirs.lora_config()
    else:
        peft = build(LoraConfig, read_checkpoint_info(adapter.folder)["model"]["peft"], "model.peft")
    kept = pretrained.folder / SOURCE_FOLDER
    like = pretrained.folder if pretrained.hugging_face else kept if (kept / CONFIG_FILE).is_file() else None
    dtype = args.dtype or (kept_dtype(like) if like else None)
    model = load(pretrained, args, own_precision(pretrained, dtype, args.delta), peft)
    delta = args.delta and checksum(args.delta)[1]
    adapter.check(model.model_config, pretrained.identity(pretrained.digest(), delta))
    if args.delta:
        apply_delta(args.delta, model)
    adapter.load(model)
    tokenizer = pretrained.folder / "tokenizer"
    where = tokenizer if tokenizer.is_dir() and not pretrained.hugging_face else None
    args.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    export_hf(model, args.target, like, where, getattr(torch, dtype) if dtype else None, args.max_shard_size)
    return f"{args.source} with the adapter {args.adapter} in its weights in {args.target}"


def run_adapter(args: argparse.Namespace) -> str:
    from megatron_ext.hf.adapter_files import write_adapters
    from megatron_ext.hf.files import check_target
    from megatron_ext.models import GPTModelConfig
    from megatron_ext.models.config import without_idle
    from megatron_ext.runtime.checkpoint import read_adapters, read_checkpoint_info
    from megatron_ext.runtime.distributed import ParallelSizes, initialize
    from recipes.cli.config import build
    from recipes.run.adapters import BASE_KEY

    check_target(args.target)
    folder = args.source.resolve()
    info = read_checkpoint_info(folder)
    initialize(ParallelSizes())
    tensors = read_adapters(folder)
    config = build(GPTModelConfig, without_idle(info["model"]), "model")
    start = (info.get("config", {}).get("pretrained_checkpoint") or {}).get("restore_from_path")
    args.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_adapters(config, args.target, tensors, args.base or start, info.get(BASE_KEY))
    return f"adapter in {args.target}"


def run_verify(args: argparse.Namespace) -> str:
    import torch.distributed as dist

    from megatron_ext.models.prompt_streams import text_logits
    from megatron_ext.runtime.collectives import together
    from recipes.data.tokenizer import load_tokenizer
    from tools.converting.sources import load, open_source
    from tools.converting.verifying import compare, open_theirs, same_vocabulary, texts_of

    texts, theirs = texts_of(args), open_theirs(args.source)
    pretrained = open_source(args.model or args.source, args, "CHECKPOINT" if args.model else "HF_FOLDER")
    tokenizer = load_tokenizer(args.source)
    rows = [tokenizer.encode_prompt(text) for text in texts]
    if not all(rows):
        raise UserError(
            f"the text {texts[rows.index([])]!r} is no token to the tokenizer of {args.source}; leave it out"
        )
    same_vocabulary(theirs, pretrained, rows)
    model = load(pretrained, args, args.precision)
    ours = [text_logits(model, row).cpu() for row in rows]
    said = ""
    with together():
        if dist.get_rank() == 0:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
            worst, agreed = compare(args, texts, rows, ours)
            said = f"{sum(map(len, rows))} tokens, largest difference of a logit {worst:.2e}, same next token {agreed}"
    return said


def run_patch(args: argparse.Namespace) -> str:
    from megatron_ext.hf import make_patch

    args.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    places = make_patch(args.delta, args.source, args.target)
    return f"patch of block {', '.join(place.name for place in places)} in {args.target}"


def run_apply(args: argparse.Namespace) -> str:
    from megatron_ext.hf import apply_patch

    args.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    places = apply_patch(args.source, args.patch, args.target)
    return f"{args.source} with another block {', '.join(place.name for place in places)} in {args.target}"


@user_errors()
def main() -> None:
    args = arguments(__doc__)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    said = {
        "import": run_import, "export": run_export, "verify": run_verify, "merge": run_merge, "adapter": run_adapter,
        "patch": run_patch, "apply": run_apply,
    }[args.command](args)  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        print(said)
    if args.command in ("import", "export", "verify", "merge", "adapter"):
        from megatron_ext.runtime.distributed import shutdown

        shutdown()


if __name__ == "__main__":
    main()
