"""Write problems of a reasoning-gym task, for `trainer.grpo.reward=reasoning_gym`.

Rows are `{"messages" or "prompt", "reasoning_gym": {"task", "answer", "metadata"}}`. No question is in both files. Needs the
extra `gym`.

    python tools/make_reasoning_gym.py --task chain_sum --out runs/sums --options '{min_terms: 2, max_terms: 2}'
    python recipes/train_grpo.py --config-name grpo_tiny data.train_path=runs/sums/train.jsonl \\
        data.validation_path=runs/sums/test.jsonl trainer.grpo.reward=reasoning_gym ...
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megatron_ext.errors import UserError  # noqa: E402
from recipes.rewards.reasoning_gym import load_reasoning_gym, verifier  # noqa: E402

SYSTEM = "Think, then give the final answer alone between <answer> and </answer>."


def entries(task: str, options: dict[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    """So many with different questions, as JSON holds them.

    Raises:
        UserError: no such task or options, too few different questions, or answers that JSON does not hold.
    """
    gym = load_reasoning_gym()
    found: dict[str, dict] = {}
    try:
        data = gym.create_dataset(task, size=4 * count + 100, seed=seed, **options)
    except Exception as error:  # its own assertions among them
        raise UserError(f"reasoning-gym makes no {task} with {options}: {type(error).__name__}: {error}") from error
    for entry in data:
        try:
            entry = json.loads(json.dumps({"task": task, **entry}))
            right = verifier(task)(answer=entry["answer"], entry=entry)
        except Exception as error:
            raise UserError(f"{task} cannot be kept in a file: {type(error).__name__}: {error}") from error
        if right <= 0:
            raise UserError(f"{task} cannot be kept in a file: its verifier then refuses its own answers")
        found.setdefault(entry["question"], entry)
        if len(found) == count:
            return list(found.values())
    raise UserError(f"{task} has {len(found)} different questions with these options, {count} are asked for")


def row(entry: dict[str, Any], plain: bool) -> dict[str, Any]:
    question = entry.pop("question")
    if plain:
        return {"prompt": f"{question}\n", "reasoning_gym": entry}
    talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return {"messages": talk, "reasoning_gym": entry}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="of reasoning-gym, such as chain_sum")
    parser.add_argument("--options", type=yaml.safe_load, default={}, help="of the task, as YAML: {min_terms: 2}")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--plain", action="store_true", help="prompts of plain text, for a tokenizer without a chat template"
    )
    args = parser.parse_args()
    if min(args.train, args.test) < 1 or not isinstance(args.options, dict):
        parser.error("--train and --test must be at least 1, --options a mapping")
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"error: {args.out} is not empty; choose another --out")
    try:
        found = entries(args.task, args.options, args.train + args.test, args.seed)
    except UserError as error:
        sys.exit(f"error: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", found[: args.train]), ("test", found[args.train :])):
        rows = "".join(json.dumps(row(entry, args.plain)) + "\n" for entry in part)
        (args.out / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    print(f"{args.train} and {args.test} problems of {args.task} in {args.out}")


if __name__ == "__main__":
    main()
