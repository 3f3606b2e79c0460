"""The command line. Nothing is imported for it that takes long."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["DTYPES", "arguments", "sized"]

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


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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

    command = commands.add_parser("merge", parents=[ranks], help="a model with an adapter in its weights")
    command.add_argument(
        "source", type=Path, metavar="MODEL", help="Hugging Face folder or checkpoint that it stands on"
    )
    command.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of PEFT's, or checkpoint with adapters")
    command.add_argument("target", type=Path, metavar="HF_FOLDER")
    command.add_argument(
        "--delta", type=Path, help="a block's delta.safetensors that was in the model when the adapter was trained"
    )
    command.add_argument(
        "--dtype", choices=DTYPES, help="default: that of the config.json it came with, else the model's"
    )
    command.add_argument("--max-shard-size", type=sized, default="5GB", metavar="SIZE", help="of a file (default: 5GB)")

    command = commands.add_parser("adapter", help="checkpoint with adapters to a folder of PEFT's")
    command.add_argument("source", type=Path, metavar="CHECKPOINT")
    command.add_argument("target", type=Path, metavar="PEFT_FOLDER")
    command.add_argument("--base", metavar="PATH", help="base_model_name_or_path (default: that of the run)")

    command = commands.add_parser("patch", help="a block's delta.safetensors to a patch of the Hugging Face folder")
    command.add_argument("delta", type=Path)
    command.add_argument("source", type=Path, metavar="HF_FOLDER")
    command.add_argument("target", type=Path, metavar="PATCH")

    command = commands.add_parser("apply", help="a copy of a Hugging Face folder with a patch in it")
    command.add_argument("source", type=Path, metavar="HF_FOLDER")
    command.add_argument("patch", type=Path)
    command.add_argument("target", type=Path, metavar="NEW_HF_FOLDER")
    return parser.parse_args()
