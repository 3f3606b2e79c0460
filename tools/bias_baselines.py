"""What LFTF is compared with that trains nothing: a closed-form edit of one MLP, steering at generation, another checkpoint.

    python tools/bias_baselines.py edit runs/biased/checkpoints/final --block 3 --text runs/bias-data/neutral_train.jsonl \\
        --validation-text runs/bias-data/neutral_test.jsonl --out runs/edited
    python tools/bias_baselines.py steer runs/biased/checkpoints/final --block 3 --out runs/steered
    python tools/bias_baselines.py other runs/biased/checkpoints/final --out runs/of_grpo \\
        --checkpoint runs/grpo_bias/checkpoints/final

Measured on the test professions, before and after, as train_lftf.py does; edit and direction are made on the training
professions.
Leaves result.json and report.md in --out. One process.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError
from recipes.cli.errors import user_errors

if TYPE_CHECKING:
    from recipes.bias.lftf_result import LFTFResult

METHODS = ("edit", "steer", "other")


def measure(args: argparse.Namespace) -> LFTFResult:
    from megatron_ext.blocks.editing import edit_mlp
    from megatron_ext.blocks.steering import find_steering, steered
    from recipes.bias.evaluation import evaluate
    from recipes.bias.lftf_result import LFTFResult
    from recipes.bias.models import CheckpointModel
    from recipes.bias.prompts import load_prompt_sets, load_texts, pair_tokens
    from recipes.bias.samples import continuations
    from recipes.bias.scorers import MegatronScorer
    from recipes.bias.settings import LFTFSettings, LocateConfig
    from recipes.cli.config import build
    from recipes.run.pretrained import Pretrained

    config = build(
        LocateConfig,
        {
            "pretrained_checkpoint": {"restore_from_path": str(args.model)},
            "exp_manager": {"explicit_log_dir": str(args.out)},
            "data": {"prompts": {"professions_path": args.professions and str(args.professions)}},
        },
    )
    opened, words = CheckpointModel(config), config.data.prompts.pair
    pair = pair_tokens(opened.tokenizer, (words.first, words.second))
    sets = load_prompt_sets(config.data.prompts, opened.tokenizer, opened.longest)
    texts, held_out = (
        load_texts(str(path), opened.tokenizer, opened.longest) if path else []
        for path in (args.text, args.validation_text)
    )
    with opened.session() as session:
        model, scorer, train = session.model, MegatronScorer(session.model), sets["train"]

        def score() -> dict:
            found = evaluate(scorer, sets["test"], [[token] for token in pair], held_out)
            settings = LFTFSettings()
            said = continuations(model, opened.tokenizer, sets["test"], settings.num_samples, settings.sample_tokens)
            return found | {"samples": said}

        before, places, how = score(), [str(args.block)], args.method
        if args.method == "edit":
            places, how = [f"{args.block} mlp"], f"closed-form edit, others weighted {args.weight:g}"
            edit_mlp(model, args.block, train.bias_tokens, pair, texts, args.weight)
            after = score()
        elif args.method == "steer":
            how = f"steered behind it, strength {args.strength:g}"
            with steered(model, find_steering(model, args.block, train.probe(pair, None, 1)), args.strength):
                after = score()
        else:
            # Seen from here: a result that is passed on names no place of this machine.
            places, how = None, f"checkpoint {os.path.relpath(args.checkpoint)}"
            Pretrained.open(str(args.checkpoint)).load(model)
            after = score()
        result = LFTFResult(places=places, loss={}, stopped=how, before=before, after=after)
        session.check_folder()
        result.write(session.log_dir, (words.first, words.second))
    return result


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("model", type=Path, help="checkpoint of ours, or a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the result")
    parser.add_argument("--block", type=int, default=1, help="edited, or steered behind; from 0")
    parser.add_argument("--weight", type=float, default=1.0, help="edit: of other keys' values, which shall stay")
    parser.add_argument("--strength", type=float, default=1.0, help="steer: share of the direction that is taken away")
    parser.add_argument("--checkpoint", type=Path, help="other: the one that is measured after the model")
    parser.add_argument("--text", type=Path, help='edit: JSONL rows {"text"} whose values shall stay')
    parser.add_argument("--validation-text", type=Path, help='JSONL rows {"text"} whose perplexity is measured')
    parser.add_argument("--professions", type=Path, help="professions.json in the published format (default: ours)")
    args = parser.parse_args()
    needs = {"edit": "text", "other": "checkpoint"}.get(args.method)
    if needs and getattr(args, needs) is None:
        raise UserError(f"{args.method} needs --{needs}")
    if not 0 < args.weight < math.inf:
        raise UserError(f"--weight {args.weight:g} must be a number above 0")
    if not math.isfinite(args.strength):
        raise UserError(f"--strength {args.strength:g} must be a number")
    result = measure(args)
    for name in ("afgb", "ub", "pronoun_mass", "perplexity"):
        if name in result.before:
            print(f"{name}: {result.before[name]:.4f} -> {result.after[name]:.4f}")
    print(f"report: {args.out / 'report.md'}")


if __name__ == "__main__":
    main()
