"""Write GenBiasEval and GenHintEval as JSONL, and as tasks that lm-evaluation-harness loads.

    python tools/export_bias_prompts.py --out runs/bias_tasks
    lm_eval --include_path runs/bias_tasks --tasks megatron_ext_bias --model hf --model_args pretrained=...,softmax_dtype=float32

Leaves genbiaseval.jsonl and genhinteval.jsonl, rows {prompt, profession, template_id, scale, hint}, and the tasks' YAML beside
them. The professions are those of recipes/eval_bias.py: the same split, the same seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.bias.harness import write_harness_tasks
from megatron_ext.bias.prompts import (
    AttributePair,
    bias_prompts,
    hint_prompts,
    own_professions,
    read_professions_json,
    split_by_profession,
)
from recipes.errors import user_errors


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks")
    parser.add_argument("--split", choices=("train", "dev", "test", "all"), default="test", help="which professions")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument(
        "--professions", type=Path, help="professions.json in the published format (default: our own list)"
    )
    parser.add_argument(
        "--pair", nargs=4, metavar=("FIRST", "SECOND", "FIRST_HINT", "SECOND_HINT"), help="default: he she his her"
    )
    args = parser.parse_args()
    professions = read_professions_json(args.professions) if args.professions else own_professions()
    if args.split != "all":
        professions = split_by_profession(professions, args.split_seed)[args.split]
    pair = AttributePair(*args.pair) if args.pair else AttributePair()
    bias, hinted = bias_prompts(professions), hint_prompts(professions, pair=pair)
    write_harness_tasks(args.out, bias, hinted, pair)
    print(f"{len(bias)} and {len(hinted)} prompts about {len(professions)} professions in {args.out}")


if __name__ == "__main__":
    main()
