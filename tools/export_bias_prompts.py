"""Write GenBiasEval and GenHintEval as JSONL, and as tasks that lm-evaluation-harness loads.

    python tools/export_bias_prompts.py --out runs/bias_tasks
    lm_eval --include_path runs/bias_tasks --tasks megatron_ext_bias --model hf --model_args pretrained=...,softmax_dtype=float32

Leaves genbiaseval.jsonl and genhinteval.jsonl, rows {prompt, profession, template_id, scale, hint}, and the tasks' YAML beside
them. The prompts are those of recipes/eval_bias.py, chosen by its own code; the options are its keys of data.prompts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.bias.harness import write_harness_tasks
from megatron_ext.bias.prompts import AttributePair, PromptsConfig
from recipes.cli.errors import user_errors


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks")
    parser.add_argument("--split", choices=("train", "dev", "test", "all"), default="test", help="which professions")
    parser.add_argument("--split-seed", type=int, help="of the split by profession")
    parser.add_argument(
        "--professions", type=Path, help="professions.json in the published format (default: our own list)"
    )
    parser.add_argument(
        "--most-definitional", type=float, help="leave out professions whose definitional score is larger"
    )
    parser.add_argument("--exclude", nargs="+", help="professions to leave out by name")
    parser.add_argument(
        "--pair", nargs=4, metavar=("FIRST", "SECOND", "FIRST_HINT", "SECOND_HINT"), help="default: he she his her"
    )
    parser.add_argument("--bias-templates", nargs="+", help="texts with {profession} (default: our nine)")
    parser.add_argument("--hint-templates", nargs="+", help="texts with {profession} and {hint} (default: our nine)")
    args = parser.parse_args()
    settings = read_settings(args)
    professions = settings.professions()[args.split]
    bias, hinted = settings.prompts(professions)
    write_harness_tasks(args.out, bias, hinted, settings.pair)
    print(f"{len(bias)} and {len(hinted)} prompts about {len(professions)} professions in {args.out}")


def read_settings(args: argparse.Namespace) -> PromptsConfig:
    """data.prompts as the options say; what they leave out has the recipe's default."""
    given = {
        "professions_path": None if args.professions is None else str(args.professions),
        "most_definitional": args.most_definitional,
        "exclude": args.exclude,
        "split_seed": args.split_seed,
        "pair": args.pair and AttributePair(*args.pair),
        "bias_templates": args.bias_templates,
        "hint_templates": args.hint_templates,
    }
    return PromptsConfig(**{name: value for name, value in given.items() if value is not None})


if __name__ == "__main__":
    main()
