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

from megatron_ext.errors import UserError
from recipes.cli.errors import user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ext.models import PrefixGroupedGPT
    from recipes.run.pretrained import Pretrained

DTYPES = ("float32", "bfloat16", "float16")
UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3}


def sized(text: str) -> int:
    """Bytes: 5GB, 200MB, or a number."""
    number, factor = text, 1
    for unit in UNITS:
        if text.upper().endswith(unit):
            number, factor = text[: -len(unit)], UNITS[unit]
    try:
        found = int(float(number) * factor)
    except (ValueError, OverflowError):  # no number; infinity
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size of at least a byte: give one such as 5GB, 200MB or 100000"
        )
    return found


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


def open_source(path: Path, args: argparse.Namespace, metavar: str) -> Pretrained:
    """The model at a path that the command line gives as `metavar`, which the ranks can hold.

    Raises:
        UserError: see `Pretrained.open`; or --tensor and --pipeline do not divide it, or the processes.
    """
    from megatron_ext.runtime.distributed import world_size
    from recipes.run.pretrained import Pretrained

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


def load(pretrained: Pretrained, args: argparse.Namespace, precision: str) -> PrefixGroupedGPT:
    """This rank's stage."""
    import torch

    from megatron_ext.models import GPTModelConfig, build_gpt
    from megatron_ext.runtime.distributed import ParallelSizes, initialize
    from recipes.cli.config import build

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
    from megatron_ext.hf.config import CONFIG_FILE
    from megatron_ext.hf.raw import read_json

    if not (folder / CONFIG_FILE).is_file():
        return None
    config = read_json(folder / CONFIG_FILE)
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in DTYPES else None


def run_import(args: argparse.Namespace) -> str:
    import dataclasses

    from megatron_ext.hf.files import check_target
    from megatron_ext.models import GPTModelConfig
    from megatron_ext.runtime.checkpoint import save_checkpoint
    from recipes.data.tokenizer import load_tokenizer

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

    from megatron_ext.blocks.delta import apply_delta, read_delta
    from megatron_ext.hf import export_hf
    from megatron_ext.hf.config import CONFIG_FILE
    from megatron_ext.hf.files import check_target
    from megatron_ext.models.placement import PRECISIONS
    from megatron_ext.runtime.checkpoint import read_checkpoint_info
    from megatron_ext.runtime.checkpoint_files import check_files
    from recipes.run.pretrained import SOURCE_FOLDER

    check_target(args.target)
    pretrained = open_source(args.source, args, "CHECKPOINT")
    folder = (
        pretrained.folder
    )  # what the source was when it was opened: a link such as latest moves while its run goes on
    kept = folder / SOURCE_FOLDER
    like = args.like or (args.source if pretrained.hugging_face else kept if (kept / CONFIG_FILE).is_file() else None)
    tokenizer = folder / "tokenizer"
    dtype = args.dtype or (kept_dtype(like) if like else None)
    # In its own type: what the folder's type has no room for is rounded when it is written.
    precision = pretrained.precision or ("bf16" if dtype == "bfloat16" else "32")
    if args.delta:  # in that of the training, in which the delta fits
        trained = read_delta(args.delta)[0]["dtype"]
        precision = next(name for name, kind in PRECISIONS.items() if str(kind) == f"torch.{trained}")
    model = load(pretrained, args, precision)
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


def texts_of(args: argparse.Namespace) -> list[str]:
    """What verify is to read, from --text and --text-file.

    Raises:
        UserError: nothing, or no UTF-8.
    """
    texts = list(args.text or [])
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"--text {text!r} is no UTF-8 text")
    if args.text_file:
        try:
            texts += [line for line in args.text_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"--text-file {args.text_file} is no UTF-8 text: {error}") from error
    if not texts:
        raise UserError("nothing to compare: give --text or --text-file")
    return texts


def open_theirs(source: Path) -> Pretrained:
    """What is compared with.

    Raises:
        UserError: it is no Hugging Face folder.
    """
    from recipes.run.pretrained import Pretrained

    theirs = Pretrained.open(str(source), "HF_FOLDER")
    if not theirs.hugging_face:
        raise UserError(f"{source} is a checkpoint of ours: name the Hugging Face folder first, then the checkpoint")
    return theirs


def same_vocabulary(theirs: Pretrained, model: Pretrained, rows: list[list[int]]) -> None:
    """
    Raises:
        UserError: the vocabularies differ, or the tokenizer's is larger.
    """
    source, size, here = theirs.path, theirs.architecture["vocab_size"], model.architecture["vocab_size"]
    if size != here:
        raise UserError(
            f"the vocabularies differ: {here} rows in {model.path}, {size} in {source}; name the folder that was exported from it"
        )
    if (largest := max((token for row in rows for token in row), default=0)) >= size:
        raise UserError(
            f"the tokenizer of {source} gives token {largest}, the model has {size} rows; name its own folder"
        )


def compare(args: argparse.Namespace, texts: list[str], rows: list[list[int]], ours: list[Tensor]) -> tuple[float, int]:
    """(largest difference of a logit, same next tokens) beside transformers.

    Raises:
        UserError: transformers cannot load the folder, a logit is not finite, or the difference is too large.
    """
    import torch

    from megatron_ext.models.placement import PRECISIONS
    from recipes.bias.scorers import HuggingFaceScorer

    theirs = HuggingFaceScorer(args.source, torch.device("cpu"), PRECISIONS[args.precision])
    worst, agreed = 0.0, 0
    for text, row, mine in zip(texts, rows, ours, strict=True):
        other = theirs.logits(row)
        for logits, whose in ((mine, f"{args.model or args.source} here"), (other, f"{args.source} in transformers")):
            if bad := int((~logits.isfinite().all(1)).sum()):
                raise UserError(
                    f"{whose} has logits that are not finite behind {bad} of {len(row)} tokens of {text[:40]!r}: its "
                    "weights are of no use"
                )
        gap, same = float((mine - other).abs().max()), int((mine.argmax(1) == other.argmax(1)).sum())
        print(f"  {len(mine):>6} tokens   largest difference {gap:.2e}   same next token {same} of {len(mine)}   "
              f"{text[:40]!r}")  # fmt: skip
        worst, agreed = max(worst, gap), agreed + same
    if not worst <= args.tolerance:
        raise UserError(
            f"{args.model or args.source} and transformers' {args.source} differ: a logit by {worst:.2e}, more than "
            f"--tolerance {args.tolerance:.0e}"
        )
    return worst, agreed


def run_verify(args: argparse.Namespace) -> str:
    import torch.distributed as dist

    from megatron_ext.models.prompt_streams import text_logits
    from megatron_ext.runtime.collectives import together
    from recipes.data.tokenizer import load_tokenizer

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
    return f"patch of block {make_patch(args.delta, args.source, args.target)} in {args.target}"


def run_apply(args: argparse.Namespace) -> str:
    from megatron_ext.hf import apply_patch

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
