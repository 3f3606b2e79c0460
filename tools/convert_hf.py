"""Hugging Face models in and out of Megatron: Llama, Mistral, Qwen2 and 2.5, Qwen3, in safetensors.

    python tools/convert_hf.py export runs/grpo/checkpoints/final runs/my-model     # a folder that transformers, vLLM, ... load
    python tools/convert_hf.py verify ~/models/Qwen2.5-0.5B --text "The capital of France is"
    python tools/convert_hf.py import ~/models/Qwen2.5-0.5B runs/qwen               # a checkpoint; recipes need none, see below
    python tools/convert_hf.py patch runs/lftf/delta.safetensors ~/models/Qwen2.5-0.5B runs/block.safetensors
    python tools/convert_hf.py apply ~/models/Qwen2.5-0.5B runs/block.safetensors runs/mended

A model that is too large for one process is spread over ranks by torchrun, whatever the layout that it was trained on:

    torchrun --nproc-per-node 8 tools/convert_hf.py export --tensor 4 --pipeline 2 runs/grpo/checkpoints/final runs/my-model

Recipes read a Hugging Face folder themselves: pretrained_checkpoint.restore_from_path=~/models/Qwen2.5-0.5B. Nothing is ever
overwritten, and what is written appears under its name when it is whole.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes.errors import user_errors

if TYPE_CHECKING:
    from megatron_ext.models import PrefixGroupedGPT
    from recipes.pretrained import Pretrained

DTYPES = ("float32", "bfloat16", "float16")
UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3}


def sized(text: str) -> int:
    """Bytes: 5GB, 200MB, or a number."""
    for unit, factor in UNITS.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    return int(text)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ranks = argparse.ArgumentParser(add_help=False)
    ranks.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor-parallel size")
    ranks.add_argument("--pipeline", type=int, default=1, metavar="N", help="pipeline-parallel size")

    command = commands.add_parser("import", parents=[ranks], help="Hugging Face folder to checkpoint")
    command.add_argument("source", type=Path, metavar="HF_FOLDER")
    command.add_argument("target", type=Path, metavar="CHECKPOINT")
    command.add_argument(
        "--precision", choices=("32", "bf16"), help="default: bf16 if the folder's weights are, else 32"
    )

    command = commands.add_parser("export", parents=[ranks], help="checkpoint to Hugging Face folder")
    command.add_argument("source", type=Path, metavar="CHECKPOINT")
    command.add_argument("target", type=Path, metavar="HF_FOLDER")
    command.add_argument("--like", type=Path, metavar="HF_FOLDER", help="take config.json, generation_config.json and the "
                         "tokenizer from here (default: what the checkpoint has kept of where it came from)")  # fmt: skip
    command.add_argument("--delta", type=Path, help="put a block's delta.safetensors into the checkpoint first")
    command.add_argument(
        "--dtype", choices=DTYPES, help="default: that of the config.json it came with, else the model's"
    )
    command.add_argument("--max-shard-size", type=sized, default="5GB", metavar="SIZE", help="of a file (default: 5GB)")

    command = commands.add_parser("verify", parents=[ranks], help="compare logits with those of transformers")
    command.add_argument("source", type=Path, metavar="HF_FOLDER")
    command.add_argument(
        "model", type=Path, nargs="?", metavar="CHECKPOINT", help="default: the same folder, read by us"
    )
    command.add_argument("--text", action="append", help="what to read; may be repeated")
    command.add_argument("--text-file", type=Path, help="one text a line")
    command.add_argument("--precision", choices=("32", "bf16"), default="32", help="of both models")
    command.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit (default: 1e-4)")

    command = commands.add_parser("patch", help="a block's delta.safetensors to a patch of the Hugging Face folder")
    command.add_argument("delta", type=Path)
    command.add_argument("source", type=Path, metavar="HF_FOLDER")
    command.add_argument("target", type=Path, metavar="PATCH")

    command = commands.add_parser("apply", help="a copy of a Hugging Face folder with a patch in it")
    command.add_argument("source", type=Path, metavar="HF_FOLDER")
    command.add_argument("patch", type=Path)
    command.add_argument("target", type=Path, metavar="NEW_HF_FOLDER")
    return parser.parse_args(argv)


def load(pretrained: Pretrained, args: argparse.Namespace, precision: str) -> PrefixGroupedGPT:
    """This rank's stage."""
    import torch

    from megatron_ext.models import GPTModelConfig, build_gpt
    from megatron_ext.runtime.distributed import ParallelSizes, initialize
    from recipes.config import build

    layout: dict = {"tensor_model_parallel_size": args.tensor, "pipeline_model_parallel_size": args.pipeline}
    if torch.cuda.is_available():
        layout["attention_kernel"] = "blockwise"  # the fast ones take bf16 alone
    config = build(GPTModelConfig, pretrained.architecture | layout | {"precision": precision}, "model")
    device = initialize(ParallelSizes(args.tensor, args.pipeline))
    model = build_gpt(config, device)
    pretrained.load(model)
    return model


def kept_dtype(folder: Path) -> str | None:
    """The type that a config.json names."""
    from megatron_ext.models.hf.config import CONFIG_FILE, read_json

    if not (folder / CONFIG_FILE).is_file():
        return None
    config = read_json(folder / CONFIG_FILE)
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in DTYPES else None


def run_import(args: argparse.Namespace) -> str:
    import dataclasses

    from megatron_ext.models import GPTModelConfig
    from megatron_ext.models.hf.files import check_target
    from megatron_ext.runtime.checkpoint import save_checkpoint
    from recipes.data import load_tokenizer
    from recipes.pretrained import Pretrained

    check_target(args.target)
    pretrained = Pretrained.open(str(args.source))
    if not pretrained.hugging_face:
        raise ValueError(f"{args.source} is a checkpoint of ours already; import takes a Hugging Face folder")
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

    from megatron_ext.models.delta import apply_delta
    from megatron_ext.models.hf import export_hf
    from megatron_ext.models.hf.config import CONFIG_FILE
    from megatron_ext.runtime.checkpoint import read_checkpoint_info
    from megatron_ext.runtime.checkpoint_files import check_files
    from recipes.pretrained import SOURCE_FOLDER, Pretrained

    pretrained = Pretrained.open(str(args.source))
    kept = args.source / SOURCE_FOLDER
    like = args.like or (args.source if pretrained.hugging_face else kept if (kept / CONFIG_FILE).is_file() else None)
    tokenizer = args.source / "tokenizer"
    dtype = args.dtype or (kept_dtype(like) if like else None)
    # In its own type: what the folder's type has no room for is rounded when it is written.
    model = load(pretrained, args, pretrained.precision or ("bf16" if dtype == "bfloat16" else "32"))
    for part in () if pretrained.hugging_face else ("tokenizer", SOURCE_FOLDER):
        check_files(args.source, part, read_checkpoint_info(args.source)["files"])
    if args.delta:
        apply_delta(args.delta, model)
    where = tokenizer if tokenizer.is_dir() and not args.like else None
    args.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    export_hf(model, args.target, like, where, getattr(torch, dtype) if dtype else None, args.max_shard_size)
    described = f"config.json like {like}'s" if like else "config.json made for it"
    return f"Hugging Face folder in {args.target}, {dtype or str(model.model_config.dtype).removeprefix('torch.')}, {described}"


def run_verify(args: argparse.Namespace) -> str:
    import torch
    import torch.distributed as dist

    from megatron_ext.models.config import PRECISIONS
    from megatron_ext.models.generation import text_logits
    from recipes.data import load_tokenizer
    from recipes.pretrained import Pretrained
    from recipes.scorers import HuggingFaceScorer

    texts = list(args.text or [])
    if args.text_file:
        try:
            texts += [line for line in args.text_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"--text-file {args.text_file} is no UTF-8 text: {error}") from error
    if not texts:
        raise ValueError("nothing to compare: give --text or --text-file")
    pretrained = Pretrained.open(str(args.model or args.source))
    tokenizer = load_tokenizer(args.source)
    rows = [tokenizer.encode(text, add_special_tokens=True) for text in texts]
    model = load(pretrained, args, args.precision)
    ours = [text_logits(model, row).cpu() for row in rows]
    worst, agreed = 0.0, 0
    if dist.get_rank() == 0:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        theirs = HuggingFaceScorer(args.source, torch.device("cpu"), PRECISIONS[args.precision])
        for number, mine in enumerate(ours):
            other = theirs.logits(rows[number])[:, : mine.size(1)]
            gap, same = float((mine - other).abs().max()), int((mine.argmax(1) == other.argmax(1)).sum())
            print(f"  {len(mine):>6} tokens   largest difference {gap:.2e}   same next token {same} of {len(mine)}   "
                  f"{texts[number][:40]!r}")  # fmt: skip
            worst, agreed = max(worst, gap), agreed + same
    held = [worst]
    dist.broadcast_object_list(held, src=0)
    if not held[0] <= args.tolerance:
        raise ValueError(
            f"{args.model or args.source} and transformers' {args.source} differ: a logit by {held[0]:.2e}, more than "
            f"--tolerance {args.tolerance:.0e}"
        )
    return f"{sum(map(len, rows))} tokens, largest difference of a logit {worst:.2e}, same next token {agreed}"


def run_patch(args: argparse.Namespace) -> str:
    from megatron_ext.models.hf import make_patch

    args.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    return f"patch of block {make_patch(args.delta, args.source, args.target)} in {args.target}"


def run_apply(args: argparse.Namespace) -> str:
    from megatron_ext.models.hf import apply_patch

    args.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    return f"{args.source} with another block {apply_patch(args.source, args.patch, args.target)} in {args.target}"


@user_errors()
def main() -> None:
    args = arguments()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    said = {"import": run_import, "export": run_export, "verify": run_verify, "patch": run_patch, "apply": run_apply}[
        args.command
    ](args)
    if os.environ.get("RANK", "0") == "0":
        print(said)
    if args.command in ("import", "export", "verify"):
        from megatron_ext.runtime.distributed import shutdown

        shutdown()


if __name__ == "__main__":
    main()
